"""A module without its weights and masks, from which a fresh module for each phase is made."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from gapfx.masks import split_fqn
from gapfx.runtime.module_masks import without_bits


def skeleton_of(module: nn.Module) -> nn.Module:
    """A deep copy whose parameters are meta tensors and whose masks are empty; tied parameters stay tied."""
    empty = {
        fqn: nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        for fqn, parameter in module.named_parameters()
    }
    return _copy(module, empty)


def hollow(parameter: nn.Parameter) -> None:
    """Free the memory of a parameter; its shape stays."""
    parameter.data = parameter.data.new_empty(()).expand(parameter.shape)


def module_from(
    skeleton: nn.Module,
    value: Callable[[str, Tensor], Tensor],
    device: torch.device,
    place: Callable[[nn.Parameter], None] | None = None,
) -> nn.Module:
    """A fresh module on `device`, still without masks; the skeleton is left as it was.

    `value(fqn, parameter)` gives each parameter's tensor, one after another, for the module to keep; `place` is called
    with each new parameter before the next one is made.
    """
    filled: dict[str, nn.Parameter] = {}
    for fqn, parameter in skeleton.named_parameters():
        made = value(fqn, parameter).detach().to(device)
        filled[fqn] = nn.Parameter(made, requires_grad=parameter.requires_grad)
        if place is not None:
            place(filled[fqn])
    return _copy(skeleton, filled).to(device)


def _copy(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> nn.Module:
    """A deep copy with these parameters in place of its own."""
    held: dict[int, Tensor] = {id(old): parameters[fqn] for fqn, old in module.named_parameters()}
    twin = copy.deepcopy(module, held | without_bits(module))
    for fqn, old in module.named_parameters(remove_duplicate=False):
        path, name = split_fqn(fqn)
        if isinstance(module.get_submodule(path), torch.jit.ScriptModule):
            # Its deep copy asks no memo and makes its parameters results of a clone, which no optimizer takes.
            new = next(parameters[first] for first, item in module.named_parameters() if item is old)
            setattr(twin.get_submodule(path), name, new)
    return twin
