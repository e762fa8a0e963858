"""Products of an input with a compact weight: one code, which is called in two ways.

As an op of torch it is one node for whoever looks on: compile, export, fake tensors, modes. The way through torch's
dispatcher takes longer than the product of a small layer, though, so where nobody looks on an autograd function calls
the code directly. Both ways end in the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Forward = Callable[..., Tensor]  # of x, values, bits, bias and what else the op takes
Backward = Callable[..., list[Tensor]]  # of the gradient, x, values, bits, what else there is, and which are wanted


@dataclass(frozen=True)
class Product:
    """Called with x, live values, bits, bias and what else the op takes."""

    op: Forward
    direct: Forward

    def __call__(self, x: Tensor, *others: Any) -> Tensor:
        """By the shorter way where that is allowed."""
        return (self.direct if is_unseen(x) else self.op)(x, *others)


def is_unseen(x: Tensor) -> bool:
    """Whether nobody looks on: no compiler, tracer, mode or transform, and a tensor with data."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return False
    if type(x) is not Tensor or x.device.type == "meta":
        return False
    internals: Any = torch._C  # pyright: ignore[reportPrivateUsage]
    return not internals._len_torch_dispatch_stack() and internals._functorch.peek_interpreter_stack() is None


def product(op: Any, forward: Forward, backward_op: Backward, backward: Backward) -> Product:
    """The op, of which `forward` is the code, with `backward_op` for its gradient, of which `backward` is the code."""
    gradients_once = once_differentiable(partial(_gradients, backward))

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:
            _keep(ctx, inputs, None)
            return forward(*inputs)

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Any) -> Any:
            return gradients_once(ctx, *grad_outputs)

    op.register_autograd(partial(_gradients, backward_op), setup_context=_keep)
    return Product(op, Direct.apply)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor | None) -> None:
    x, values, bits, _, *ctx.others = inputs
    ctx.save_for_backward(x, values, bits)


def _gradients(backward: Backward, ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    found = backward(gradient, *ctx.saved_tensors, *ctx.others, needs)
    of_x, of_values, of_bias = (item if need else None for item, need in zip(found, needs, strict=True))
    return of_x, of_values, None, of_bias, *(None for _ in ctx.others)
