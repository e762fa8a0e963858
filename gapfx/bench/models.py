"""The whole model of a task in each way to run it, for timing: training steps and forwards at the task's batch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gapfx.bench.clock import Run, Stopwatch
from gapfx.bench.compilation import COMPILED, CompiledModel, reserved
from gapfx.bench.findings import DENSE, What
from gapfx.bench.forwards import EXPORT, Inputs, forward_of, inputs_of, session_or_reason
from gapfx.bench.layers import LAYER
from gapfx.bench.live import hold_live
from gapfx.bench.verdict import GROWN, MODEL
from gapfx.errors import UserError
from gapfx.ops.recompute import without_dense
from gapfx.runtime.feed import Feed
from gapfx.runtime.skeleton import module_from
from gapfx.settings import Settings
from gapfx.sparse import Compiled
from gapfx.task import Task
from gapfx.training import DEFAULT_LR, Request, build_model, compile_task

BLOCKS = "block:4x1"
ONNX = "dense ONNX Runtime"
LOWERING = "lowering"
# Of the time that is left, for the measurements of kernels that each way to lower the model asks for.
CALIBRATION_SHARE = 0.1


@dataclass(frozen=True)
class Bench:
    """A task and what its models are run on."""

    task: Task
    settings: Settings
    feed: Feed
    batch: Any
    device: torch.device
    with_compile: bool

    def dense(self) -> nn.Module:
        """The model as the task builds it."""
        return build_model(self.task, self.settings).to(self.device, self.dtype)

    def compiled(self, calibration_seconds: float = 0.0, **changes: Any) -> Compiled:
        """The model, lowered, with other settings; kernels are measured for `calibration_seconds` at most."""
        settings = dataclasses.replace(self.settings, form="compact", **changes)
        request = Request(Path(), calibration_seconds=calibration_seconds)
        return compile_task(self.task, settings, self.feed, None, request)

    def loss_of(self, module: nn.Module) -> Any:
        """The loss of the batch."""
        assert self.task.loss is not None
        return self.task.loss(module, self.batch)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.bfloat16 if self.settings.dtype == "bf16" else torch.float32

    def on_device(self, value: Any) -> Any:
        """A batch on the device, its numbers in the dtype of the weights."""

        def move(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.to(self.device, self.dtype if leaf.is_floating_point() else leaf.dtype)

        return tree_map(move, value)


def modules_of(bench: Bench, watch: Stopwatch) -> dict[str, nn.Module]:
    """Way -> module; the frozen weights of lowered ones are held by their live values."""
    found = {DENSE: bench.dense()}
    ways = {"expand": {"kernels": "expand"}, "sparse": {"kernels": bench.settings.kernels}}
    if bench.settings.pattern != BLOCKS:
        ways["sparse 4x1"] = {"kernels": bench.settings.kernels, "pattern": BLOCKS}
    for way, changes in ways.items():
        lowered = _lowered(bench, watch, changes)
        if isinstance(lowered, str):
            watch.miss(MODEL, "step", 0, way, lowered)
            continue
        groups = lowered.plan.groups
        module = lowered.module.to(bench.device, bench.dtype)
        if len(groups) > 1:
            twin = module_from(module, lambda _, parameter: parameter.detach().clone(), bench.device)
            found[way + GROWN] = hold_live(twin, lowered.plan, {len(groups) // 2})
        found[way] = hold_live(module, lowered.plan)
    return found


def _lowered(bench: Bench, watch: Stopwatch, changes: dict[str, Any]) -> Compiled | str:
    """The model, lowered, or why not. Kernels are measured where one measurement should do with their share."""
    share = CALIBRATION_SHARE * watch.left
    limit = share if watch.longest.get(LAYER, 0.0) < share else 0.0
    try:
        found = watch.begin(LOWERING, lambda: bench.compiled(limit, **changes))
    except UserError as error:
        return error.what
    if not isinstance(found, str):
        watch.notes += [note for note in found.choices.notes if note not in watch.notes]
    return found


def time_model(bench: Bench, watch: Stopwatch, positions: int, seconds: float) -> None:
    """Forwards of the ways that can be deployed, then training steps of every way, for about `seconds` in all.

    torch.compile comes after the others.
    """
    spare = watch.left - seconds
    seconds -= reserved(watch, seconds) if bench.with_compile else 0.0
    modules = modules_of(bench, watch)
    inputs = inputs_of(modules[DENSE], bench.loss_of)
    forwards = {way: forward_of(module.eval(), inputs) for way, module in modules.items() if GROWN not in way}
    session = watch.begin(EXPORT, lambda: _session(modules[DENSE], inputs, bench), spare=spare)
    if isinstance(session, str):
        watch.miss(MODEL, "forward", positions, ONNX, session)
    else:
        forwards[ONNX] = session
    watch.time(MODEL, "forward", positions, forwards, seconds / 4)
    steps = {way: _step(bench, module.train()) for way, module in modules.items()}
    watch.time(MODEL, "step", positions, steps, seconds * 3 / 4)
    if bench.with_compile:
        _time_compiled(bench, watch, positions, inputs, spare)


def _time_compiled(bench: Bench, watch: Stopwatch, positions: int, inputs: Inputs, spare: float) -> None:
    module = bench.dense()
    model = CompiledModel(module, watch)
    runs: dict[What, Run] = {"forward": forward_of(module, inputs), "step": _step(bench, module)}
    for what, run in runs.items():
        module.train(what == "step")
        ready = model.ready(run, what, spare)
        if isinstance(ready, str):
            watch.miss(MODEL, what, positions, COMPILED, ready)
        else:
            watch.time(MODEL, what, positions, {COMPILED: ready}, max(0.0, watch.left - spare) / 2)


def _step(bench: Bench, module: nn.Module) -> Run:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    own = bench.task.optimizer
    optimizer: Any = own(parameters) if own else torch.optim.AdamW(parameters, lr=DEFAULT_LR, fused=True)

    def step() -> None:
        with without_dense():
            value = bench.loss_of(module)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _session(module: nn.Module, inputs: Inputs, bench: Bench) -> Run | str:
    """The dense model in ONNX Runtime, or why not."""
    if bench.device.type != "cpu" or bench.dtype != torch.float32:
        return "compared in fp32 on the CPU alone"
    return session_or_reason(module, inputs)
