"""A DeepSpeed engine for one phase: opened on a fresh module, closed without a trace at the phase's end."""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from gapfx.errors import UserError
from gapfx.runtime.shards import OptimizerState, read_optimizer, read_weights, write_optimizer, write_weights

Dtype = Literal["fp32", "bf16"]
OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
LossFunction = Callable[[nn.Module, Any], Tensor]
# Bucket sizes in elements. DeepSpeed's default of 5e8 is a buffer of gigabytes even for a toy model.
BUCKET_SIZE = 20_000_000


@dataclass(frozen=True)
class EngineOptions:
    """How a step is made: samples a rank takes at once, how many such micro-batches a step has, and on what.

    A global batch is `micro_batch * accumulation * world_size` samples. `clip` is the largest global gradient norm,
    0 for none.
    """

    micro_batch: int
    accumulation: int = 1
    clip: float = 1.0
    dtype: Dtype = "fp32"
    zero_stage: int = 1

    def deepspeed(self, world_size: int) -> dict[str, Any]:
        """The DeepSpeed configuration of reference settings that hold at every stage."""
        return {
            "train_batch_size": self.micro_batch * self.accumulation * world_size,
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clip,
            "steps_per_print": 10**9,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": self.dtype == "bf16"},
            "zero_optimization": {
                "stage": self.zero_stage,
                "reduce_bucket_size": BUCKET_SIZE,
                "allgather_bucket_size": BUCKET_SIZE,
            },
        }


@dataclass(frozen=True)
class StepResult:
    """Mean loss of this rank's micro-batches, and the global gradient norm before clipping."""

    loss: float
    grad_norm: float


@contextmanager
def process_group() -> Generator[None]:
    """Membership of the process group that the environment describes; one that was joined before stays joined.

    A group must be left before the interpreter ends: its threads run on, and C++ aborts a process that ends with them.
    """
    if torch.distributed.is_initialized():
        yield
        return
    _join_process_group()
    try:
        yield
    finally:
        import deepspeed.comm.comm

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
    # This op is compiled at init, serves inference alone, and a build that dies leaves a lock that hangs later runs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)


def local_device() -> torch.device:
    """The device of this rank, by DeepSpeed's accelerator."""
    import deepspeed.accelerator

    accelerator: Any = deepspeed.accelerator.get_accelerator()
    return torch.device(accelerator.current_device_name())


class Engine:
    """One phase's engine. `module` is the module that it trains; use `close` before the next one is opened."""

    def __init__(self, module: nn.Module, optimizer: OptimizerFactory, options: EngineOptions) -> None:
        import deepspeed

        is_rounded = options.dtype != "fp32"
        exact = {fqn: p.detach().clone() for fqn, p in module.named_parameters()} if is_rounded else {}
        trainable = [p for p in module.parameters() if p.requires_grad]
        made = cast(object, optimizer(trainable))
        if not isinstance(made, torch.optim.Optimizer):
            raise UserError(f"optimizer(params) returned a {type(made).__name__}", fix="return a torch.optim.Optimizer")
        world_size = torch.distributed.get_world_size()
        self._deepspeed: Any = deepspeed.initialize(
            model=module, optimizer=made, config=options.deepspeed(world_size), dist_init_required=False
        )[0]
        self.module = module
        self.options = options
        self._zero: Any = self._deepspeed.optimizer
        self._base_lrs = [float(group["lr"]) for group in self._zero.param_groups]
        if is_rounded:
            write_weights(module, exact)

    def train_step(self, batches: Iterable[Any], loss: LossFunction, lr_factor: float) -> StepResult:
        """One optimizer step over this rank's micro-batches."""
        for group, base in zip(self._zero.param_groups, self._base_lrs, strict=True):
            group["lr"] = base * lr_factor
        losses = [self._accumulate(loss(self._deepspeed, batch)) for batch in batches]
        norm = self._deepspeed.get_global_grad_norm()
        return StepResult(float(torch.stack(losses).mean()), float(norm) if norm is not None else float("nan"))

    def _accumulate(self, value: object) -> Tensor:
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            got = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UserError(
                f"loss(model, batch) returned {got}", fix="return the mean loss as one number with a gradient"
            )
        self._deepspeed.backward(value)
        self._deepspeed.step()
        return value.detach().float().flatten()

    def lr(self, lr_factor: float) -> float:
        """Learning rate of the first parameter group at this factor."""
        return self._base_lrs[0] * lr_factor

    def weights(self) -> dict[str, Tensor]:
        """FQN -> whole fp32 parameter (collective)."""
        return read_weights(self.module, self._group)

    def optimizer_state(self) -> OptimizerState:
        """The whole optimizer state (collective)."""
        return read_optimizer(self.module, self._zero, self._group)

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Continue from `state` instead of empty moments."""
        write_optimizer(self.module, self._zero, state)

    def close(self) -> None:
        """Free the engine. `destroy` alone leaves root hooks and reference cycles that keep every engine alive."""
        engine, zero = self._deepspeed, self._zero
        inner = zero.optimizer
        engine.destroy()
        for hook in ("module_forward_pre_hook", "module_forward_post_hook"):
            handle = getattr(engine, hook, None)
            if handle is not None:
                handle.remove()
        for parameter in self.module.parameters():
            parameter.grad = None
            parameter.data = torch.empty(0, dtype=parameter.dtype)
            vars(parameter).clear()
        for part in (zero, engine):
            vars(part).clear()
        inner.state.clear()
        inner.param_groups.clear()
        gc.collect()

    @property
    def _group(self) -> Any:
        return self._deepspeed.seq_data_parallel_group


def buffers_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every buffer but the masks, non-persistent ones too: what a fresh module must take over beside the weights."""
    from gapfx.masks import MASK_PREFIX, split_fqn

    for fqn, buffer in module.named_buffers():
        if not split_fqn(fqn)[1].startswith(MASK_PREFIX):
            yield fqn, buffer
