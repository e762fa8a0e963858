"""`gapfx::mask`: a weight with exact zeros where its mask bit is 0.

One opaque op, so that fx, export, compile and the recorder see one node. Backward lets the gradient of live weights
through and gives exact zeros for the others; only the bits are kept for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gapfx.masks import unpack


def masked(weight: Tensor, bits: Tensor) -> Tensor:
    """`weight` where the bit is 1, exact 0 elsewhere. bits: packed uint8, see gapfx.masks."""
    # where, not a product: 0 * inf is NaN and -1 * 0 is -0.0.
    return torch.where(unpack(bits, weight.shape), weight, 0)


mask = torch.library.custom_op("gapfx::mask", masked, mutates_args=())


@mask.register_fake
def _(weight: Tensor, bits: Tensor) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _keep_bits(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _mask_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    (bits,) = ctx.saved_tensors
    return mask(gradient, bits), None


mask.register_autograd(_mask_gradient, setup_context=_keep_bits)
_LIBRARY = torch.library.Library("gapfx", "FRAGMENT")
# By ops that `torch.func` knows: inside of its transforms a custom op has neither a gradient nor a batch.
_LIBRARY.impl("mask", masked, "FuncTorchDynamicLayerFrontMode")
