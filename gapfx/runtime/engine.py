"""A DeepSpeed engine for one phase: opened on a fresh module, closed without a trace at the phase's end."""

from __future__ import annotations

import gc
import importlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gapfx.errors import UserError
from gapfx.ops.recompute import without_dense
from gapfx.runtime.deepspeed_config import deepspeed_config, own_config, without_flags
from gapfx.runtime.fp32_buffers import telling_of_buffers
from gapfx.runtime.memory import release_free_memory
from gapfx.runtime.optimizers import Numbers, OptimizerFactory, check_optimizer, counted, make_optimizer, numbers_in
from gapfx.runtime.rendezvous import init_method
from gapfx.runtime.same_weights import SameWeights
from gapfx.runtime.shards import EvenShards, FlatShards, Shards, WholeShards, numel_of, scalars
from gapfx.runtime.teams import Team, all_in_one_team

Dtype = Literal["fp32", "bf16"]
LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class EngineOptions:
    """How a step is made: samples a rank takes at once, how many such micro-batches a step has, and on what.

    A global batch is `micro_batch * accumulation * world_size` samples. `clip` is the largest global gradient norm,
    0 for none. `is_live`: weights are held by their live values, and no dense one is kept for the backward. `deepspeed`
    is what the user adds to DeepSpeed's configuration.
    """

    micro_batch: int
    accumulation: int = 1
    clip: float = 1.0
    dtype: Dtype = "fp32"
    zero_stage: int = 1
    is_live: bool = False
    deepspeed: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def among(self, size: int, ranks: int) -> EngineOptions:
        """The same global batch on `size` ranks where these options are for `ranks`."""
        if size == ranks:
            return self
        return replace(self.beside_flags(), accumulation=self.accumulation * ranks // size)

    def beside_flags(self) -> EngineOptions:
        """The same with a file that may no longer contradict what these options are changed to."""
        return replace(self, deepspeed=without_flags(self.deepspeed))

    def config(self, world_size: int) -> dict[str, Any]:
        """DeepSpeed's configuration."""
        own = own_config(
            micro_batch=self.micro_batch,
            accumulation=self.accumulation,
            world_size=world_size,
            clip=self.clip,
            dtype=self.dtype,
            stage=self.zero_stage,
        )
        return deepspeed_config(own, self.deepspeed)


@dataclass(frozen=True)
class StepResult:
    """Mean loss of this rank's micro-batches, and the global gradient norm before clipping.

    The norm is infinite where a gradient is not a finite number, NaN where DeepSpeed was told not to compute it.
    """

    loss: float
    grad_norm: float


@contextmanager
def process_group() -> Generator[None]:
    """Membership of the process group that the environment describes; one that was joined before stays joined.

    A group must be left before the interpreter ends: its threads run on, and C++ aborts a process that ends while one
    of them still drops a tensor. They are joined when the last reference goes, so cycles of a closed engine go first.
    """
    if torch.distributed.is_initialized():
        yield
        return
    _join_process_group()
    try:
        yield
    finally:
        import deepspeed.comm.comm

        gc.collect()
        deepspeed.comm.destroy_process_group()
        deepspeed.comm.comm.cdb = None  # else DeepSpeed takes the group that is gone for a live one


def _join_process_group() -> None:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed's own calls; nothing that a user could change.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+. is deprecated", category=FutureWarning)
    # Imported while a group is joined, its default arguments would hold the group for good; DeepSpeed imports it.
    importlib.import_module("torch.distributed.nn.functional")
    # This op is compiled at init, serves inference alone, and a build that dies leaves a lock that hangs later runs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    take_device()
    deepspeed.init_distributed(verbose=False, init_method=init_method())


def take_device() -> None:
    """Take this rank's own device of the machine, before a collective or a tensor would be put on the first one.

    Raises UserError where there are more ranks than GPUs.
    """
    import deepspeed.accelerator

    if not torch.cuda.is_available():
        return
    accelerator: Any = deepspeed.accelerator.get_accelerator()
    number, local = int(accelerator.device_count()), int(os.environ.get("LOCAL_RANK", "0"))
    if local >= number:
        raise UserError(
            f"rank {os.environ.get('RANK', local)} would be number {local + 1} on a machine with {number} GPUs",
            fix=f"start at most {number} ranks a machine, or set CUDA_VISIBLE_DEVICES to nothing to train on the CPU",
        )
    accelerator.set_device(local)


def check_config(options: EngineOptions, world_size: int) -> None:
    """Raise UserError for a configuration that DeepSpeed will refuse; a process group must be joined."""
    from deepspeed.runtime.config import DeepSpeedConfig

    config = options.config(world_size)
    try:
        DeepSpeedConfig(config)
    except Exception as error:
        if not options.deepspeed:
            raise
        raise UserError(
            f"DeepSpeed refuses the configuration: {error}", where="--deepspeed", fix="mend the file"
        ) from error


def local_device() -> torch.device:
    """The device of this rank, by DeepSpeed's accelerator."""
    import deepspeed.accelerator

    accelerator: Any = deepspeed.accelerator.get_accelerator()
    return torch.device(accelerator.current_device_name())


def place(options: EngineOptions, team: Team) -> Callable[[nn.Parameter], None] | None:
    """What is done to each parameter of a module for an engine as soon as it is made: stage 3 keeps a rank's part.

    None below stage 3, where every rank has the whole.
    """
    if options.zero_stage < 3:
        return None
    import deepspeed

    config, group = options.config(team.peers.size), team.peers.group
    init: Any = deepspeed.zero.Init(
        data_parallel_group=group, config_dict_or_path=config, dtype=compute_dtype(options), mpu=team.mpu
    )
    return init._zero_init_param


def compute_dtype(options: EngineOptions) -> torch.dtype:
    """Of the weights in the forward."""
    return torch.bfloat16 if options.dtype == "bf16" else torch.float32


def optimizer_for(module: nn.Module, factory: OptimizerFactory, options: EngineOptions) -> torch.optim.Optimizer:
    """The task's optimizer for the module. Raises UserError for one that an engine with these options cannot have."""
    made = make_optimizer(factory, [p for p in module.parameters() if p.requires_grad])
    # Stage 3 calls it for each group, or each part of a large one, and shows it all groups every time.
    part = options.beside_flags().config(1)["zero_optimization"].get("sub_group_size", 10**9)
    has_parts = len(made.param_groups) > 1 or sum(map(numel_of, module.parameters())) > part
    check_optimizer(
        made, in_parts=bool(options.zero_stage) or options.is_live, in_turns=options.zero_stage == 3 and has_parts
    )
    return made


class Engine:
    """One phase's engine. `module` is the module that it trains; use `close` before the next one is opened.

    `trained` are the parameters that the optimizer was given, by FQN, and `group_of` their parameter groups; `shards`
    says where their fp32 weights are. `around` is entered for every forward with its backward.
    """

    def __init__(
        self, module: nn.Module, optimizer: OptimizerFactory, options: EngineOptions, team: Team | None = None
    ) -> None:
        import deepspeed

        made = optimizer_for(module, optimizer, options)
        given = {id(p): index for index, group in enumerate(made.param_groups) for p in group["params"]}
        self.trained = {fqn: p for fqn, p in module.named_parameters() if p.requires_grad and id(p) in given}
        self.group_of = {fqn: given[id(parameter)] for fqn, parameter in self.trained.items()}
        team = team or all_in_one_team()
        config = options.config(team.peers.size)
        self._deepspeed: Any = deepspeed.initialize(
            model=module, optimizer=made, config=config, mpu=team.mpu, dist_init_required=False
        )[0]
        self.module = module
        self.options = options
        zero = self._deepspeed.optimizer
        self.optimizer: Any = getattr(zero, "optimizer", zero)
        self.shards: Shards = _shards(zero, options.zero_stage, team.peers.rank)
        self.around: Callable[[], AbstractContextManager[object]] = nullcontext
        self._base_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._same = SameWeights.of(self.trained, team.peers, options.zero_stage)
        self._made = [numbers_in(group) for group in self.optimizer.param_groups]

    def train_step(self, batches: Iterable[Any], loss: LossFunction, lr_factor: float) -> StepResult:
        """One optimizer step over this rank's micro-batches."""
        for group, base in zip(self.optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = base * lr_factor
        losses: list[Tensor] = []
        norm: Any = None
        for batch in batches:
            with self.around():
                losses.append(self._backward(self._forward(batch, loss)))
            if self.shards.is_whole and self._deepspeed.is_gradient_accumulation_boundary():
                norm = nn.utils.get_total_norm([p.grad for p in self.trained.values() if p.grad is not None])
            self._deepspeed.step()
        norm = self._deepspeed.get_global_grad_norm() if norm is None else norm
        return StepResult(float(torch.stack(losses).mean()), math.nan if norm is None else _finite_or_infinite(norm))

    def _forward(self, batch: Any, loss: LossFunction) -> object:
        telling = telling_of_buffers(self.module) if self.options.dtype == "bf16" else nullcontext()
        with telling, without_dense() if self.options.is_live else nullcontext():
            return loss(self._deepspeed, batch)

    def _backward(self, value: object) -> Tensor:
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            got = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UserError(
                f"loss(model, batch) returned {got}", fix="return the mean loss as one number with a gradient"
            )
        if self._same is not None:
            self._same.check(value, is_last=self._deepspeed.is_gradient_accumulation_boundary())
        self._deepspeed.backward(value)
        return value.detach().float().flatten()

    def lr(self, lr_factor: float) -> float:
        """Learning rate of the first parameter group at this factor."""
        return self._base_lrs[0] * lr_factor

    def scalars(self) -> list[Numbers]:
        """For each parameter group the optimizer state that is one number, with what the group itself has counted."""
        groups = zip(scalars(self.shards, self.optimizer), self.optimizer.param_groups, self._made, strict=True)
        return [of_weights | counted(group, made) for of_weights, group, made in groups]

    def drop_gradients(self) -> None:
        """Free what only another step would need."""
        for parameter in self.trained.values():
            parameter.grad = None

    def drop_moment(self, key: str) -> None:
        """Free one kind of optimizer state."""
        for state in self.optimizer.state.values():
            state.pop(key, None)

    def close(self) -> None:
        """Free the engine."""
        _dismantle(self._deepspeed, self.module, self.optimizer)
        self.trained.clear()
        self.optimizer.state.clear()
        self.optimizer.param_groups.clear()
        release_free_memory()


def _finite_or_infinite(norm: Any) -> float:
    """DeepSpeed tells -1 where the norm is no finite number."""
    value = float(norm)
    return value if 0 <= value < math.inf else math.inf


@contextmanager
def for_evaluation(module: nn.Module, options: EngineOptions) -> Generator[nn.Module]:
    """The module, ready for forwards alone: at stage 3 each rank gathers what a layer needs, while it does."""
    if options.zero_stage < 3:
        yield module
        return
    import deepspeed

    config = options.config(all_in_one_team().peers.size)
    config["zero_optimization"].pop("offload_optimizer", None)
    engine: Any = deepspeed.initialize(model=module, config=config, dist_init_required=False)[0]
    try:
        yield module
    finally:
        _dismantle(engine, module, None)


def _dismantle(engine: Any, module: nn.Module, optimizer: Any) -> None:
    """Free an engine. `destroy` alone leaves root hooks and reference cycles that keep every engine alive."""
    import deepspeed.utils.groups

    deepspeed.utils.groups.mpu = None  # it would be asked by the next engine, which may be another team's
    zero = engine.optimizer
    offload = getattr(zero, "parameter_offload", None)
    engine.destroy()
    hooks = [getattr(engine, name, None) for name in ("module_forward_pre_hook", "module_forward_post_hook")]
    for hook in (*hooks, getattr(offload, "fwd_pre_hook", None), getattr(zero, "fwd_pre_hook", None)):
        if hook is not None:
            hook.remove()
    for parameter in module.parameters():
        parameter.grad = None
        parameter.data = torch.empty(0, dtype=parameter.dtype)
        vars(parameter).clear()
    coordinator = getattr(offload or zero, "param_coordinator", None)
    for part in (coordinator, offload, zero, engine):
        if part is not None and part is not optimizer:
            vars(part).clear()
    eager = [part for part in module.modules() if not isinstance(part, torch.jit.ScriptModule)]
    for part in eager:
        # Stage 3 hangs classes of closures on modules, in circles that the garbage collection does not take.
        vars(part).clear()


def _shards(zero: Any, stage: int, rank: int) -> Shards:
    if stage == 0:
        return WholeShards(zero)
    return FlatShards(zero) if stage < 3 else EvenShards(zero, rank)


def buffers_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every buffer but the masks, non-persistent ones too: what a fresh module must take over beside the weights."""
    from gapfx.masks import MASK_PREFIX, split_fqn

    for fqn, buffer in module.named_buffers():
        if not split_fqn(fqn)[1].startswith(MASK_PREFIX):
            yield fqn, buffer
