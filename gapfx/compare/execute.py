"""Trains what is missing of a study, several runs at once, each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gapfx.compare.cost import Costs, is_found_by_run, with_shares
from gapfx.compare.outcomes import Outcome, recorded
from gapfx.compare.records import live_shares, record_of
from gapfx.compare.study import Trial
from gapfx.errors import Interrupted, UserError
from gapfx.flops import training_flops
from gapfx.method_settings import as_read
from gapfx.plan import Plan
from gapfx.run_dir import RunDir
from gapfx.runtime.stop import stop_on_signal

_POLL_SECONDS = 0.05


@dataclass
class Runner:
    """Starts runs of one task below `out`, at most `parallel` at once; `tell` says what has ended."""

    costs: Costs
    out: Path
    parallel: int
    tell: Callable[[str], None]
    _running: list[tuple[Trial, subprocess.Popen[str]]] = field(default_factory=list[Any])

    def run(self, trials: Iterable[Trial]) -> list[Outcome]:
        """Outcomes of all trials; those that are there are taken as they are.

        Raises UserError when a run fails or was made with other settings, Interrupted when a stop is asked for; the
        runs that go on meanwhile save and end first.
        """
        wanted = list(trials)
        missing = [trial for trial in wanted if not self._is_there(trial)]
        with stop_on_signal() as should_stop:
            try:
                self._train(missing, should_stop)
            finally:
                self._stop()
        return list(self.outcomes(wanted))

    def outcomes(self, trials: Iterable[Trial]) -> Iterator[Outcome]:
        """Outcomes of the trials that are finished."""
        return recorded(self.costs.study, trials, self.costs.records)

    def _is_there(self, trial: Trial) -> bool:
        folder, record = self.out / trial.name, self.costs.records.found.get(trial.name)
        run = RunDir(folder)
        if record is None and not run.config.is_file():
            return False
        _, settings = self.costs.load(self.costs.given(trial))
        if not (record.is_of(settings) if record else as_read(run.settings()) == as_read(settings)):
            raise UserError(
                f"{folder} was made with other settings than the study has now",
                fix="give another --out, or delete that run and its line in runs.jsonl",
            )
        if record is None and run.summary.is_file():
            self._keep(trial)
        return trial.name in self.costs.records.found

    def _train(self, missing: Sequence[Trial], should_stop: Callable[[], bool]) -> None:
        done, waiting = 0, deque(missing)
        while waiting or self._running:
            if should_stop():
                raise Interrupted("stopped; the same command goes on where the runs have saved")
            while waiting and len(self._running) < self.parallel and not self._must_wait(waiting[0]):
                trial = waiting.popleft()
                self._running.append((trial, self._start(trial)))
            for trial, process in [each for each in self._running if each[1].poll() is not None]:
                done += 1
                self._running.remove((trial, process))
                self._finish(trial, process)
                self.tell(f"{done} of {len(missing)}: {trial.name}")
            time.sleep(_POLL_SECONDS)

    def _must_wait(self, trial: Trial) -> bool:
        return self.costs.waits_for(trial) in [running.name for running, _ in self._running]

    def _start(self, trial: Trial) -> subprocess.Popen[str]:
        folder = self.out / trial.name
        resume = ["--resume"] if (folder / "config.json").is_file() else []
        flags = flags_of(self.costs.given(trial))
        command = [sys.executable, "-m", "gapfx", "sparsify", self.costs.study.task, "--out", str(folder), *flags]
        threads = str(max(1, (os.cpu_count() or 1) // self.parallel))
        environment = {"OMP_NUM_THREADS": threads, **os.environ}
        return subprocess.Popen(
            [*command, *resume],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def _finish(self, trial: Trial, process: subprocess.Popen[str]) -> None:
        _, told = process.communicate()
        if process.returncode:
            raise UserError(
                f"the run {trial.name} ended with {process.returncode}: {told.strip()[-500:]}",
                where=str(self.out / trial.name),
                fix="mend the task or the study and give the command again: finished runs are kept",
            )
        self._keep(trial)

    def _keep(self, trial: Trial) -> None:
        run = RunDir(self.out / trial.name)
        plan, summary = Plan.load(run.plan), json.loads(run.summary.read_text())
        shares = live_shares(summary) if is_found_by_run(plan) else {}
        flops, epochs = training_flops(with_shares(plan, shares), self.costs.forward()), self.costs.epochs(plan)
        record = record_of(trial.name, summary, run.settings(), flops=flops, epochs=epochs, shares=shares)
        self.costs.records.add(record)

    def _stop(self) -> None:
        """Ask the runs to save and end, and wait for them."""
        for _, process in self._running:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for _, process in self._running:
            process.communicate()


def flags_of(settings: Mapping[str, Any]) -> list[str]:
    """Settings as flags of `gapfx sparsify`."""
    flags: list[str] = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            many = value if isinstance(value, (list, tuple)) else [value]
            flags += [part for one in many for part in (flag, str(one))]
    return flags
