"""Masking in place: for weights that are used where no read of an attribute can be masked.

The masked weights are zeroed before each forward of the model, and a hook on each of them lets no gradient into what
is masked. So zeros stay zeros after optimizer steps, loaded states and other masks, from the next forward on.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gapfx.masks import bits_of, mask_home, stored_parameter, unpack


@dataclass(frozen=True)
class InPlaceMasks:
    """Forward pre-hook of the root that masks these weights; a deep copy of the root masks its own.

    Raises RuntimeError, in the forward, for a weight that is not there whole (FSDP2, ZeRO-3, tensor parallel).
    """

    fqns: tuple[str, ...]

    def __call__(self, root: nn.Module, args: Any) -> None:
        """Zero what is masked, and see to it that each weight has the hook for its gradient."""
        with torch._C.DisableTorchFunction(), torch.no_grad():  # pyright: ignore[reportPrivateUsage]
            for fqn in self.fqns:
                _mask_now(root, fqn)


def mask_in_place(root: nn.Module, fqns: tuple[str, ...]) -> None:
    """Mask these weights in place from the next forward of `root` on, and no others."""
    hooks = vars(root)["_forward_pre_hooks"]
    for key in [key for key, hook in hooks.items() if isinstance(hook, InPlaceMasks)]:
        del hooks[key]
    if fqns:
        root.register_forward_pre_hook(InPlaceMasks(fqns), prepend=True)


def _mask_now(root: nn.Module, fqn: str) -> None:
    weight = stored_parameter(root, fqn)
    if hasattr(weight, "to_local") or weight.numel() == 0:
        raise RuntimeError(
            f"{fqn} is masked in place, which needs the whole weight before the forward: it cannot be sharded"
        )
    weight.data.masked_fill_(~unpack(bits_of(root, fqn), weight.shape), 0)
    home, name = mask_home(root, fqn)
    hooks: list[object] = list((weight._backward_hooks or {}).values())
    if weight.requires_grad and not any(isinstance(hook, _GradientMask) and hook.home() is home for hook in hooks):
        weight.register_hook(_GradientMask(weakref.ref(home), name))


@dataclass(frozen=True)
class _GradientMask:
    """Gradient of a weight -> the same with exact zeros where the weight is masked now."""

    home: weakref.ref[nn.Module]
    name: str
    __torch_unserializable__: ClassVar[bool] = True  # the copy gets its own at its first forward

    def __call__(self, gradient: Tensor) -> Tensor | None:
        home = self.home()
        bits = None if home is None else vars(home)["_buffers"].get(self.name)
        return None if bits is None else gradient.masked_fill(~unpack(bits, gradient.shape), 0)
