"""How a target sparsity is shared out between weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from gapfx.errors import UserError


def erk(shapes: Mapping[str, tuple[int, ...]], sparsity: float) -> dict[str, float]:
    """Erdos-Renyi-Kernel: the density of a weight goes with sum(shape) / prod(shape); the total is the target.

    Weights whose density would pass 1 stay dense and the others are scaled again, until none does (Evci et al.,
    "Rigging the Lottery", 2020, section 3).
    """
    score = {fqn: sum(shape) / math.prod(shape) for fqn, shape in shapes.items()}
    numel = {fqn: math.prod(shape) for fqn, shape in shapes.items()}
    free, live = set(shapes), (1 - sparsity) * sum(numel.values())
    while free:
        scale = live / sum(score[fqn] * numel[fqn] for fqn in free)
        over = {fqn for fqn in free if scale * score[fqn] > 1}
        if not over:
            return {fqn: 1 - scale * score[fqn] if fqn in free else 0.0 for fqn in shapes}
        free -= over
        live -= sum(numel[fqn] for fqn in over)
    return dict.fromkeys(shapes, 0.0)


@torch.no_grad()
def one_threshold(tensors: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    """Share of each weight under one magnitude threshold over all of them.

    Exactly round(sparsity * all elements) zeros, ties going to the first; every weight keeps its largest element.
    Raises UserError for weights without values.
    """
    if any(tensor.is_meta for tensor in tensors.values()):
        raise UserError("one global threshold needs values, the model is on the meta device", fix="allocation=erk")
    total = sum(tensor.numel() for tensor in tensors.values())
    pools = {fqn: _without_largest(tensor) for fqn, tensor in tensors.items()}
    num_zeros = min(round(sparsity * total), total - len(tensors))
    if num_zeros == 0:
        return dict.fromkeys(tensors, 0.0)
    threshold = torch.cat(list(pools.values())).kthvalue(num_zeros).values
    below = {fqn: int((pool < threshold).sum()) for fqn, pool in pools.items()}
    ties = num_zeros - sum(below.values())
    for fqn, pool in pools.items():
        taken = min(ties, int((pool == threshold).sum()))
        below[fqn] += taken
        ties -= taken
    return {fqn: zeros / tensors[fqn].numel() for fqn, zeros in below.items()}


def _without_largest(tensor: Tensor) -> Tensor:
    magnitude = tensor.detach().float().abs().flatten()
    largest = int(magnitude.argmax())
    return torch.cat([magnitude[:largest], magnitude[largest + 1 :]])
