"""What a model is given in a forward, at other batch sizes too, and that forward as something to time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from gapfx.bench.clock import Run
from gapfx.bench.onnx_runtime import missing, session_of
from gapfx.errors import UserError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
EXPORT = "export"


def inputs_of(module: nn.Module, run: Callable[[nn.Module], object]) -> Inputs:
    """What `run` gives to the model in its first forward. Raises UserError when it makes none."""
    found: list[Inputs] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))

    hook = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        run(module)
    finally:
        hook.remove()
    if not found:
        raise UserError("loss() does not call the model", fix="call model(...), so that its forward can be timed")
    return found[0]


def forward_of(module: nn.Module, inputs: Inputs) -> Run:
    """A forward without gradients."""

    def forward() -> object:
        with torch.no_grad():
            return module(*inputs[0], **inputs[1])

    return forward


def batch_of(inputs: Inputs) -> int:
    """Size of the first dimension of the first tensor that has one; 0 without such a tensor."""
    return next((leaf.shape[0] for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()), 0)


def at_batch(inputs: Inputs, batch: int) -> Inputs:
    """The inputs, cut or repeated to another batch: tensors whose first dimension is that of the first tensor."""
    own = batch_of(inputs)

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] != own or own == batch:
            return leaf
        return leaf[torch.arange(batch, device=leaf.device) % own]

    return tree_map(resize, inputs)


def in_bf16(inputs: Inputs) -> Inputs:
    """The inputs with their floating numbers as bf16."""
    return tree_map(lambda x: x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)


def session_or_reason(module: nn.Module, inputs: Inputs) -> Run | str:
    """A dense model in ONNX Runtime, or why not."""
    if missing():
        return missing()
    if inputs[1] or not all(isinstance(x, Tensor) for x in inputs[0]):
        return "it takes more than tensors"
    try:
        return session_of(module.eval(), inputs[0])
    except Exception as error:
        return f"the export failed: {type(error).__name__}: {error}".splitlines()[0][:120]
