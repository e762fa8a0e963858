"""What a forward keeps for its backward, weighed by running it; meta tensors have sizes without memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gapfx.flops import memory_of


@dataclass(frozen=True)
class Activations:
    """Bytes that one forward of `samples` samples keeps; a step takes `batch` samples, `micro_batch` at once a rank.

    `micro_batch` 0: a rank takes its whole share of the batch at once.
    """

    num_bytes: int
    samples: int
    batch: int
    micro_batch: int = 0

    def of_rank(self, ranks: int) -> float:
        """Bytes on each of so many ranks; at least those of one sample."""
        at_once = self.micro_batch or max(1, self.batch // ranks)
        return self.num_bytes * at_once / self.samples

    def forwards(self, ranks: int) -> float:
        """How many such forwards a step takes on each of so many ranks; at least one micro-batch, or one sample."""
        return max(self.micro_batch or 1, self.batch / ranks) / self.samples


def kept_bytes(model: nn.Module, run: Callable[[nn.Module], object], value_bytes: int) -> int:
    """Bytes that autograd keeps of `run(model)`, each memory once, with `value_bytes` for a floating-point number.

    Weights and buffers are not counted: they are there anyway. What is recomputed (torch's checkpointing) is not kept.
    Which results an op keeps depends on the device: attention on one without a fused kernel keeps its scores.
    """
    own = {memory_of(tensor) for tensor in (*model.parameters(), *model.buffers())}
    held: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided and memory_of(tensor) not in own:
            numel = tensor.untyped_storage().nbytes() // tensor.itemsize
            # With the tensor, lest another comes to be at its address.
            held[memory_of(tensor)] = numel * (value_bytes if tensor.is_floating_point() else tensor.itemsize), tensor
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run(model)
        del result
    return sum(size for size, _ in held.values())
