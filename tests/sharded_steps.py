"""A script for each of two ranks: steps of a masked model under DDP or FSDP2, against one process with both batches.

RANK=0 WORLD_SIZE=2 ... python -m tests.sharded_steps ddp|fsdp2 CASE...
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gapfx
from gapfx.masks import stored_parameter
from gapfx.sparse import Sparse
from tests.models import CASES

STEPS = 3


def batch(case: str, rank: int, step: int) -> tuple[Any, ...]:
    torch.manual_seed(100 * step + rank)
    given = CASES[case][1]()
    return tuple(torch.randn_like(x) if x.is_floating_point() else x.roll(rank + step, -1) for x in given)


def built(case: str) -> Sparse:
    torch.manual_seed(0)
    model = CASES[case][0]()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return gapfx.sparsify(model, batch(case, 0, 0), sparsity=0.6)


def loss(model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    return model(*inputs).square().mean()


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def wrapped(model: nn.Module, how: str) -> nn.Module:
    if how == "ddp":
        return DistributedDataParallel(model)
    has_ties = len(list(model.named_parameters())) < len(list(model.named_parameters(remove_duplicate=False)))
    # FSDP2 wants a tied weight in one group.
    for child in () if has_ties else model.children():
        if next(child.parameters(), None) is not None:
            fully_shard(child)
    return cast(nn.Module, fully_shard(model))


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The weights, gathered."""
    found: dict[str, Tensor] = {}
    for fqn, _ in model.named_parameters():
        value: Any = stored_parameter(model, fqn).detach()
        found[fqn] = value.full_tensor() if hasattr(value, "full_tensor") else value
    return found


def together(case: str) -> Mapping[str, Tensor]:
    """Weights after the steps of one process on the batches of both ranks."""
    model = built(case).module
    steps = optimizer(model)
    for step in range(STEPS):
        steps.zero_grad()
        (sum(loss(model, batch(case, rank, step)) for rank in range(2)) / 2).backward()  # pyright: ignore
        steps.step()
    return whole(model)


def check(case: str, how: str) -> None:
    """Raises AssertionError for weights other than those of one process, and for zeros that did not stay."""
    expected = together(case)
    sparse = built(case)
    masks = {fqn: mask.clone() for fqn, mask in sparse.masks.items()}
    keys = list(sparse.module.state_dict())
    model = wrapped(sparse.module, how)
    steps = optimizer(model)
    for step in range(STEPS):
        steps.zero_grad()
        loss(model, batch(case, dist.get_rank(), step)).backward()
        steps.step()
    found = whole(sparse.module)
    for fqn, value in found.items():
        torch.testing.assert_close(
            value, expected[fqn], rtol=1e-5, atol=1e-6, msg=lambda text, fqn=fqn: f"{fqn}: {text}"
        )
    for fqn, mask in masks.items():
        assert not bool(found[fqn][~mask].any()), f"{fqn} is not 0 where it is masked"
        assert bool(found[fqn].any()), fqn
    assert list(sparse.module.state_dict()) == keys
    for fqn, mask in masks.items():
        sparse.set_mask(fqn, mask.roll(1, 0))
    changed, state = whole(sparse.module), sparse.dense_state_dict()
    for fqn, mask in masks.items():
        wanted = found[fqn].masked_fill(~mask.roll(1, 0), 0)
        assert torch.equal(changed[fqn], wanted), fqn
        kept: Any = state[fqn]
        assert torch.equal(kept.full_tensor() if hasattr(kept, "full_tensor") else kept, wanted), fqn


def main(how: str, *cases: str) -> None:
    dist.init_process_group("gloo")
    for case in cases:
        check(case, how)
    dist.barrier()
    # Groups that FSDP2 made itself outlive `destroy_process_group`; C++ aborts a process that ends with their threads.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
