"""What each command does, as functions of plain values that return text or an exit code."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gapfx.errors import PlanError, UserError
from gapfx.settings import Settings, merge
from gapfx.task import Task, load_task, split_entry


@dataclass(frozen=True)
class Source:
    """A task argument (`file.py` or `file.py:name`), `--entry`, and the flags that name settings."""

    task: str
    entry: str
    flags: Mapping[str, Any]

    def load(self) -> tuple[Task, Settings]:
        """The task and its settings: gapfx's defaults, the task's, the flags."""
        path, name = split_entry(self.task)
        if self.entry:
            entry_path, entry_name = split_entry(self.entry)
            name = entry_name if ":" in self.entry else self.entry
            path = entry_path if ":" in self.entry else path
        task = load_task(path, name)
        given = _with_deepspeed(task.defaults, path.parent)
        return task, merge((f"defaults of {path}", given), ("the command line", _with_deepspeed(self.flags, Path())))

    def default_out(self, method: str) -> Path:
        """`runs/TASK-METHOD`."""
        return Path("runs") / f"{split_entry(self.task)[0].stem}-{method}"


def _with_deepspeed(values: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """The text of a DeepSpeed file in place of its path, so that a run keeps what it was started with."""
    name = values.get("deepspeed")
    if not isinstance(name, str) or not name:
        return values
    from gapfx.runtime.deepspeed_config import read_deepspeed_file

    return {**values, "deepspeed": read_deepspeed_file(folder / name)}


def train_task(
    source: Source, out: Path | None, plan: Path | None, *, show_passes: bool, resume: bool, force: bool
) -> int:
    """Train, as a rank when a launcher made this process one, else with as many ranks as the settings say."""
    from gapfx.method_settings import check_read
    from gapfx.runtime.launch import is_rank, run_local_ranks, single_process_environment

    if resume and force:
        raise UserError("--resume and --force exclude each other", fix="continue the run or replace it")
    task, settings = source.load()
    if plan is None:
        check_read(settings.method, source.flags)
    if not is_rank():
        if settings.nproc > 1:
            return run_local_ranks(sys.argv[1:], settings.nproc)
        single_process_environment()
    from gapfx.training import Request, run_training

    out = out or source.default_out(settings.method)
    request = Request(
        out=out,
        resume=resume,
        force=force,
        plan=plan,
        flags=source.flags,
        observer=print_pass if show_passes else None,
    )
    summary = run_training(task, settings, request)
    if summary:
        from gapfx.report import format_summary

        print(format_summary(request.out))
    return 0


def show_bench(source: Source, threads: str, seconds: float, *, with_compile: bool, as_json: bool) -> tuple[str, bool]:
    """Timings of a task, or of the run directory that `source.task` names, and the verdict, as text or JSON.

    Also whether Ctrl-C stopped it.
    """
    began = time.monotonic()  # loading torch takes part of the time too
    from gapfx.bench.clock import Stopwatch
    from gapfx.bench.command import STOPPED, bench_run, bench_task
    from gapfx.bench.verdict import format_findings

    numbers, watch = _threads(threads), Stopwatch(seconds, began=began)
    if Path(source.task).is_dir():
        _refuse_settings({**source.flags, "entry": source.entry or None})
        findings = bench_run(Path(source.task), numbers, watch, with_compile=with_compile)
    else:
        task, settings = source.load()
        findings = bench_task(task, settings, numbers, watch, with_compile=with_compile)
    return findings.to_json() if as_json else format_findings(findings), STOPPED in findings.notes


def _threads(text: str) -> list[int]:
    """Numbers of threads; torch's own without a text."""
    import torch

    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*|", text):
        raise UserError(f"cannot read the threads {text!r}", fix="write numbers split by commas: --threads 1,2")
    numbers = [int(number) for number in text.split(",")] if text else [torch.get_num_threads()]
    most = max(os.cpu_count() or 1, torch.get_num_threads())
    if max(numbers) > most:
        raise UserError(f"{max(numbers)} threads are more than this machine has", fix=f"take at most {most}")
    return numbers


def _refuse_settings(flags: Mapping[str, Any]) -> None:
    given = [name for name, value in flags.items() if value is not None]
    if given:
        flag = given[0].replace("_", "-")
        raise UserError(f"--{flag} is for tasks: a run has its own settings", fix=f"leave --{flag} out")


def describe_passes() -> str:
    """Every pass with its options, in the order of the default pipeline where it has a place."""
    import gapfx.passes
    from gapfx.compiler import PASSES, Analysis

    lines = [f"default: {','.join(step.name for step in gapfx.passes.default_pipeline().passes)}", ""]
    for name in PASSES:
        kind = "analysis" if issubclass(PASSES[name], Analysis) else "rewrite"
        summary = (PASSES[name].__doc__ or "").strip().splitlines()[0]
        lines.append(f"{name} ({kind}): {summary}")
        lines += [f"    {field.name} = {field.default!r}" for field in dataclasses.fields(PASSES[name])]
    return "\n".join(lines)


def compare_study(path: Path, out: Path | None, parallel: int, *, collect: bool, as_json: bool) -> str:
    """Train what is missing of a study, write its files, and give its tables."""
    from gapfx.compare.cost import Costs
    from gapfx.compare.execute import Runner
    from gapfx.compare.judge import collected, judge
    from gapfx.compare.page import write_page
    from gapfx.compare.records import Records
    from gapfx.compare.study import read_study
    from gapfx.run_dir import write_atomically

    study, out = read_study(path), out or Path("runs") / path.stem
    costs = Costs(study, lambda given: Source(study.task, "", given).load(), Records.read(out))
    runner = Runner(costs, out, parallel, lambda line: print(line, file=sys.stderr, flush=True))
    tables = collected(path, out) if collect else judge(study, runner.run, out)
    write_atomically(out / "comparison.json", tables.json())
    write_atomically(out / "comparison.md", tables.markdown() + "\n")
    page = write_page(out / "comparison.html", tables)
    return tables.json() if as_json else f"{tables.text()}\n\n{page}"


def show_report(run: Path) -> str:
    """Write the report of a run directory and give its path and summary."""
    from gapfx.report import format_summary, write_report

    if not (run / "config.json").is_file():
        raise UserError(f"{run} holds no run", fix="give the directory that sparsify wrote")
    try:
        return f"{format_summary(run)}\n{write_report(run)}"
    except PlanError as error:
        raise UserError(f"the run cannot be shown: {error.what}", where=error.where) from error


def print_pass(name: str, before: str, after: str, num_before: int, num_after: int) -> None:
    """Tell what a pass has changed."""
    from gapfx.text import format_diff

    print(f"{name}: nodes {num_before} -> {num_after} ({num_after - num_before:+d})")
    if before != after:
        print(format_diff(before, after))
