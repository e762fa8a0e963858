"""A masked model whose frozen weights are held by their live values, as in a phase of a training."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import nn

from gapfx.masks import pack, split_fqn, stored_parameter
from gapfx.pattern import parse_pattern
from gapfx.plan import Plan
from gapfx.runtime.module_masks import put_bits


def hold_live(module: nn.Module, plan: Plan, grown: Container[int] = ()) -> nn.Module:
    """The module, each planned weight pruned by its size and held by its live values; groups in `grown` hold all."""
    for index, group in enumerate(plan.groups):
        for weight in group.weights:
            stored = stored_parameter(module, weight.fqn)
            mask = torch.ones(weight.shape, dtype=torch.bool)
            if index not in grown:
                mask = parse_pattern(weight.pattern).mask(stored.detach().float().abs().cpu(), weight.sparsity)
            values = nn.Parameter(stored.detach()[mask.to(stored.device)].view(-1, 1))
            put_bits(module, weight, pack(mask).to(stored.device), None)
            for fqn in () if weight.fqn in plan.in_place() else (weight.fqn, *weight.aliases):
                path, name = split_fqn(fqn)
                vars(module.get_submodule(path))["_parameters"][name] = values
    return module
