"""A module without its weights, from which a fresh module for each phase is made."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def skeleton_of(module: nn.Module) -> nn.Module:
    """A deep copy whose parameters are empty meta tensors; tied parameters stay tied, buffers are copied."""
    memo: dict[int, object] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    return copy.deepcopy(module, memo)


def module_from(skeleton: nn.Module, weights: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    """A fresh module on `device` with fp32 `weights` (FQN -> whole tensor); the skeleton is left as it was."""
    memo: dict[int, object] = {}
    for fqn, parameter in skeleton.named_parameters():
        value = weights[fqn].detach().to(device=device, dtype=parameter.dtype, copy=True)
        memo[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    return copy.deepcopy(skeleton, memo).to(device)
