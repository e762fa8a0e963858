"""A module without its weights, from which a fresh module for each phase is made."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gapfx.masks import split_fqn


def skeleton_of(module: nn.Module) -> nn.Module:
    """A deep copy whose parameters are empty meta tensors; tied parameters stay tied, buffers are copied."""
    empty = {
        fqn: nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        for fqn, parameter in module.named_parameters()
    }
    return _copy(module, empty)


def module_from(skeleton: nn.Module, weights: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    """A fresh module on `device` with fp32 `weights` (FQN -> whole tensor); the skeleton is left as it was."""
    filled: dict[str, nn.Parameter] = {}
    for fqn, parameter in skeleton.named_parameters():
        value = weights[fqn].detach().to(device=device, dtype=parameter.dtype, copy=True)
        filled[fqn] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    return _copy(skeleton, filled).to(device)


def _copy(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> nn.Module:
    """A deep copy with these parameters in place of its own."""
    twin = copy.deepcopy(module, {id(old): parameters[fqn] for fqn, old in module.named_parameters()})
    for fqn, old in module.named_parameters(remove_duplicate=False):
        path, name = split_fqn(fqn)
        if isinstance(module.get_submodule(path), torch.jit.ScriptModule):
            # Its deep copy asks no memo and makes its parameters results of a clone, which no optimizer takes.
            new = next(parameters[first] for first, item in module.named_parameters() if item is old)
            setattr(twin.get_submodule(path), name, new)
    return twin
