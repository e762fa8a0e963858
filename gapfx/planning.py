"""`gapfx plan`: a task compiled without training, its plan as text, JSON and figure, and what a run of it will take."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gapfx.activations import Activations, kept_bytes
from gapfx.commands import Source, print_pass
from gapfx.emit import Emitter
from gapfx.errors import UserError
from gapfx.estimate import Setup, Sizes
from gapfx.expectation import describe as describe_expected
from gapfx.expectation import expect, why_nothing, with_blocks
from gapfx.figure import MARKER, Sketch
from gapfx.flops import ForwardFlops, count_forward
from gapfx.forecast import Question, describe
from gapfx.method_settings import check_read
from gapfx.phasing import check_flags, with_phases
from gapfx.plan import Plan
from gapfx.quality import QualityWatch
from gapfx.settings import Settings
from gapfx.sparse import Compiled, compile_model
from gapfx.task import Task
from gapfx.text import format_kernels, format_phases, format_plan
from gapfx.training import (
    Request,
    build_model,
    compile_options,
    compile_task,
    first_batches,
    make_feed,
    setup_of,
)


@dataclass(frozen=True)
class PlanFiles:
    """Files that `gapfx plan` writes: the graph after every pass as text, and the figure of the groups."""

    graph: Path | None = None
    figure: Path | None = None

    def check(self) -> None:
        """Raises UserError for a folder that does not exist, and for a file that gapfx did not write."""
        _check_replaceable(self.graph, "# captured", "graph", "--emit-graph")
        _check_replaceable(self.figure, MARKER, "figure", "--figure")


@dataclass(frozen=True)
class Forecast:
    """What `gapfx plan` shall say beside the plan: see gapfx.forecast.Question. `on_meta` allocates no weight."""

    ranks: str = ""
    memory: str = ""
    profile: str = ""
    on_meta: bool = False


def show_plan(
    source: Source,
    input_shapes: str,
    plan: Path | None,
    files: PlanFiles,
    forecast: Forecast,
    *,
    show_passes: bool,
    as_json: bool,
) -> str:
    """Groups, weights and phases of a task as text or JSON; writes `files`."""
    files.check()
    task, settings = source.load()

    if forecast.on_meta:  # nothing can be measured, and figures of this machine would mean nothing
        settings = dataclasses.replace(settings, kernels="expand", calibrate=False)
    question = _question(forecast, settings) if forecast.ranks else None
    given = Plan.load(plan) if plan else None
    if given is None:
        check_read(settings.method, source.flags)
    emitter, sketch = Emitter() if files.graph else None, Sketch() if files.figure else None
    quality = QualityWatch()
    watchers = (quality, *(watcher for watcher in (emitter, sketch) if watcher))
    observer = print_pass if show_passes else None
    request = Request(Path(), explain=not as_json and not forecast.on_meta, observer=observer, watchers=watchers)
    if plan is not None and given is not None:
        check_flags(given, settings, _steps_per_epoch(task, settings, input_shapes), source.flags, str(plan))
    with torch.device("meta") if forecast.on_meta else contextlib.nullcontext():
        planned = _planned(task, settings, input_shapes, given, request, is_counted=question is not None)
    compiled, made = planned.compiled, planned.plan
    if files.graph and emitter:
        files.graph.write_text(emitter.text())
    if files.figure and sketch:
        files.figure.write_text(sketch.svg(made, quality.text(made).splitlines()), encoding="utf-8")
    if as_json:
        return made.to_json()
    parts = [
        format_plan(made),
        quality.text(made),
        format_kernels(made),
        _expected(compiled, made, settings),
        format_phases(made) if made.phases else "",
        describe(made, planned.sizes, planned.setup, question, planned.forward, planned.activations)
        if question
        else "",
        *(f"note: {note}" for note in compiled.notes),
    ]
    return "\n".join(part for part in parts if part)


def _steps_per_epoch(task: Task, settings: Settings, input_shapes: str) -> int:
    """Of the data, 0 where the plan is made without it."""
    has_data = task.data and task.loss and not input_shapes
    return make_feed(task, settings, 0, 1).steps_per_epoch if has_data else 0


def _question(forecast: Forecast, settings: Settings) -> Question:
    dtype = torch.bfloat16 if settings.dtype == "bf16" else torch.float32
    return Question.parse(forecast.ranks, forecast.memory, forecast.profile, dtype)


@dataclass(frozen=True)
class _Planned:
    compiled: Compiled
    plan: Plan
    sizes: Sizes
    setup: Setup
    forward: ForwardFlops | None = None
    activations: Activations | None = None


def _planned(
    task: Task, settings: Settings, input_shapes: str, given: Plan | None, request: Request, *, is_counted: bool
) -> _Planned:
    """The task compiled, with phases, and what a forecast needs."""
    if task.data and task.loss and not input_shapes:
        feed, loss = make_feed(task, settings, rank=0, world_size=1), task.loss
        compiled = compile_task(task, settings, feed, given, request)
        made = with_phases(compiled.plan, settings, feed.steps_per_epoch)
    else:
        feed, loss, inputs = None, None, _inputs(task, input_shapes)
        options = dataclasses.replace(compile_options(settings), explain=request.explain)

        def run(module: Any) -> object:
            return module(*inputs)

        compiled = compile_model(
            build_model(task, settings),
            run,
            options,
            plan=given,
            observer=request.observer,
            watchers=request.watchers,
            check=run if request.explain else None,
        )
        made = compiled.plan
    if is_counted or made.phases:
        made = with_phases(made, settings)
    numel = sum(parameter.numel() for parameter in compiled.module.parameters())
    planned = _Planned(compiled, made, Sizes.of(made, numel), setup_of(task, settings))
    if not is_counted:
        return planned
    if feed is not None and loss is not None:
        model, batch, _ = first_batches(task, settings)
        return _counted(planned, settings, model, lambda module: loss(module, batch), feed.micro_batch)
    given_inputs = _inputs(task, input_shapes)
    samples = next(
        (len(tensor) for tensor in tree_leaves(given_inputs) if isinstance(tensor, Tensor) and tensor.dim()), 1
    )
    return _counted(planned, settings, build_model(task, settings), lambda module: module(*given_inputs), samples)


def _counted(
    planned: _Planned, settings: Settings, model: nn.Module, run: Callable[[nn.Module], object], samples: int
) -> _Planned:
    """With the operations of a forward of so many samples, and what it keeps for its backward."""
    forward = count_forward(model, run)
    kept = kept_bytes(model, run, planned.setup.value_bytes)
    activations = Activations(kept, max(1, samples), settings.batch_size, settings.micro_batch)
    return dataclasses.replace(planned, forward=forward, activations=activations)


def _expected(compiled: Compiled, made: Plan, settings: Settings) -> str:
    """What the chosen kernels should give in a step, and what blocks would."""
    choices = compiled.choices
    is_measured = all(choice.is_measured for choice in choices.by_weight.values() if choice.kernel == "sparse")
    is_measured = is_measured and settings.calibrate
    # Stored figures are ratios: their seconds and those of the whole model have nothing to do with each other.
    seconds = compiled.dense_seconds if is_measured else 0.0
    expected = expect(made, choices.by_weight, seconds)
    if expected is None:
        return ""
    if not any(choice.is_measured or choice.kernel == "sparse" for choice in choices.by_weight.values()):
        return why_nothing(choices.by_weight) + "\n"
    blocks = with_blocks(made, choices, calibrate=settings.calibrate)
    with_them = expect(made, blocks, seconds) if blocks else None
    return describe_expected(expected, with_them, is_measured=is_measured, is_whole=seconds > 0)


def _check_replaceable(path: Path | None, marker: str, what: str, flag: str) -> None:
    """Only a file that begins with what gapfx writes there is replaced."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise UserError(f"the folder {path.parent} does not exist", where=flag)
    if path.exists() and not (path.is_file() and path.read_bytes().startswith(marker.encode())):
        raise UserError(f"{path} exists and holds no {what} of gapfx", where=flag, fix="name another file")


def _inputs(task: Task, text: str) -> tuple[Any, ...]:

    if text:
        shapes = text.split(",")
        wrong = [shape for shape in shapes if not re.fullmatch(r"\d+(x\d+)*", shape.strip())]
        if wrong:
            raise UserError(
                f"cannot read the shape {wrong[0]!r}", fix="write --input 2x3x224x224, inputs split by commas"
            )
        return tuple(torch.randn(*map(int, shape.strip().split("x"))) for shape in shapes)
    if task.example is None:
        raise UserError(
            "the task has no data, so there is nothing to run the model on",
            where=str(task.path),
            fix="define data(split) and loss(model, batch), or example(), or give --input 2x3x224x224",
        )
    example = task.example()
    return example if isinstance(example, tuple) else (example,)
