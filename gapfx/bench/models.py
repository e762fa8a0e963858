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
from gapfx.bench.findings import DENSE
from gapfx.bench.forwards import Inputs, forward_of, inputs_of, session_or_reason
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
COMPILED = "dense torch.compile"
ONNX = "dense ONNX Runtime"


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

    def compiled(self, **changes: Any) -> Compiled:
        """The model, lowered, with other settings."""
        settings = dataclasses.replace(self.settings, form="compact", **changes)
        return compile_task(self.task, settings, self.feed, None, Request(Path()))

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
    if bench.with_compile:
        found[COMPILED] = bench.dense()
        found[COMPILED].compile()
    ways = {"expand": {"kernels": "expand"}, "sparse": {"kernels": bench.settings.kernels}}
    if bench.settings.pattern != BLOCKS:
        ways["sparse 4x1"] = {"kernels": bench.settings.kernels, "pattern": BLOCKS}
    for way, changes in ways.items():
        try:
            compiled = bench.compiled(**changes)
        except UserError as error:
            watch.miss(MODEL, "step", 0, way, error.what)
            continue
        groups = compiled.plan.groups
        module = compiled.module.to(bench.device, bench.dtype)
        if len(groups) > 1:
            twin = module_from(module, lambda _, parameter: parameter.detach().clone(), bench.device)
            found[way + GROWN] = hold_live(twin, compiled.plan, {len(groups) // 2})
        found[way] = hold_live(module, compiled.plan)
    return found


def time_model(bench: Bench, watch: Stopwatch, positions: int, seconds: float) -> None:
    """Forwards of the ways that can be deployed, then training steps of every way, for about `seconds` in all."""
    modules = modules_of(bench, watch)
    loss = bench.task.loss
    assert loss is not None
    inputs = inputs_of(modules[DENSE], lambda model: loss(model, bench.batch))
    forwards = {way: forward_of(module.eval(), inputs) for way, module in modules.items() if GROWN not in way}
    session = _session(modules[DENSE], inputs, bench)
    if isinstance(session, str):
        watch.miss(MODEL, "forward", positions, ONNX, session)
    else:
        forwards[ONNX] = session
    watch.time(MODEL, "forward", positions, forwards, seconds / 4)
    steps = {way: _step(bench, module.train()) for way, module in modules.items()}
    watch.time(MODEL, "step", positions, steps, seconds * 3 / 4)


def _step(bench: Bench, module: nn.Module) -> Run:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    own = bench.task.optimizer
    optimizer: Any = own(parameters) if own else torch.optim.AdamW(parameters, lr=DEFAULT_LR, fused=True)
    loss = bench.task.loss
    assert loss is not None

    def step() -> None:
        with without_dense():
            value = loss(module, bench.batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _session(module: nn.Module, inputs: Inputs, bench: Bench) -> Run | str:
    """The dense model in ONNX Runtime, or why not."""
    if bench.device.type != "cpu" or bench.dtype != torch.float32:
        return "compared in fp32 on the CPU alone"
    return session_or_reason(module, inputs)
