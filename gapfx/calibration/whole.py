"""Times a whole model: what of a step is in the layers that can be sparse, and what is not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gapfx.calibration.measure import interleaved


def step_seconds(model: nn.Module, run: Callable[[nn.Module], object], seconds: float = 2.0) -> float:
    """Median of forward and backward; no gradient is left behind. 0 for a model whose output has no gradient."""
    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> object:
        found = [x for x in tree_leaves(run(model)) if isinstance(x, Tensor) and x.requires_grad]
        return torch.autograd.grad([x.sum() for x in found], leaves, allow_unused=True) if found else None

    return 0.0 if step() is None else interleaved({"step": step}, seconds)["step"]
