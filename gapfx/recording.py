"""Turns the events of a run into metrics.jsonl, progress, and what other writers show."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gapfx.plan import Plan
from gapfx.progress import Progress
from gapfx.run_dir import RunDir
from gapfx.runtime.grow_prune import sparsity_now
from gapfx.runtime.state import TrainState
from gapfx.settings import Settings
from gapfx.writers.offering import Event, Writers, open_writers
from gapfx.writers.points import Reader


class Recording:
    """Writes every event at once, so that a crash loses none; without a path (ranks above 0) it writes nothing.

    A context manager that closes the writers, of which each event is told after it stands in metrics.jsonl.
    """

    def __init__(self, path: Path | None, plan: Plan, progress: Progress, writers: Writers | None = None) -> None:
        self._path, self._plan, self._progress = path, plan, progress
        self._writers = writers or Writers(Reader(plan))
        self._sparsity, self._step = 0.0, 0
        events = RunDir(path.parent).events() if path else []
        self.seconds_before: float = next((e["seconds"] for e in reversed(events) if "seconds" in e), 0.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for warning in self._writers.close(is_done=kind is None, step=self._step):
            self._write(warning)

    def start(self, state: TrainState, *, is_resumed: bool, peaks: list[int]) -> None:
        """The first event of a run, or of its continuation; shows the phase that a resumed run is in.

        `peaks` is the memory of earlier processes, told anew as events of theirs may have been cut off.
        """
        self._sparsity = sparsity_now(state)
        if is_resumed:
            self.emit({"event": "resume", "step": state.step, "peak_rss_bytes_by_rank": peaks})
            self._progress.note(f"resumed at step {state.step}")
            inside = [phase for phase in self._plan.phases if phase.start < state.step < phase.stop]
            for phase in inside:
                self._progress.phase(phase, self._plan)
            return
        facts = {"method": self._plan.method, "num_steps": self._plan.num_steps, "phases": len(self._plan.phases)}
        self.emit({"event": "start", "step": 0, "time": time.time(), "world_size": state.peers.size, **facts})

    def emit(self, event: dict[str, Any]) -> None:
        """Record one event."""
        if self._path is None:
            return
        if "seconds" in event and event["event"] == "step":
            event = {**event, "seconds": event["seconds"] + self.seconds_before}
        self._step = event["step"]
        self._write(event)
        show = getattr(self, f"_show_{event['event']}", None)
        if show is not None:
            show(event)
        for warning in self._writers.offer(event):
            self.emit(warning)

    def _write(self, event: Event) -> None:
        assert self._path is not None
        with self._path.open("a") as file:
            file.write(json.dumps(event) + "\n")

    def _show_phase(self, event: dict[str, Any]) -> None:
        self._sparsity = event["sparsity"]
        self._progress.phase(self._plan.phases[event["phase"]], self._plan)

    def _show_step(self, event: dict[str, Any]) -> None:
        self._progress.step(event["step"], event["loss"], event["lr"], self._plan.sparsity, self._sparsity)

    def _show_eval(self, event: dict[str, Any]) -> None:
        self._sparsity = event["sparsity"]
        self._progress.eval(event["step"], event["metrics"])

    def _show_prune(self, event: dict[str, Any]) -> None:
        weights = event["weights"].values()
        kept, numel = sum(w["kept"] for w in weights), sum(w["numel"] for w in weights)
        changed = sum(w["changed_bits"] for w in weights)
        self._progress.note(
            f"pruned {', '.join(event['groups'])}: kept {kept:,} of {numel:,}, {changed:,} mask bits changed, "
            f"{event['explored']:.1%} of weights explored"
        )

    def _show_fallback(self, event: dict[str, Any]) -> None:
        self._progress.note(f"{event['problem']}; continuing from step {event['step']}")

    def _show_warning(self, event: dict[str, Any]) -> None:
        self._progress.note(event["problem"])

    def _show_checkpoint(self, event: dict[str, Any]) -> None:
        self._progress.note(f"checkpoint of step {event['step']} written")


def rewound(run: RunDir, plan: Plan, settings: Settings, step: int | None) -> tuple[Writers, list[Event]]:
    """Cut metrics.jsonl back to the checkpoint of `step`, of a new run to nothing; the writers that go on from there.

    Also warnings to emit. Raises UserError for a writer that cannot begin a new run.
    """
    before = run.events()
    run.rewind_metrics(-1 if step is None else step)
    return open_writers(
        settings.log_to,
        run.path,
        plan,
        dataclasses.asdict(settings),
        step=step or 0,
        before=before,
        kept=run.events(),
        is_resumed=step is not None,
    )
