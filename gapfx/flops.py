"""Floating point operations of a model's training, counted for the sparse form: what a method costs beside another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from gapfx.plan import Phase, Plan

Formula = Callable[..., int]
# Of the target sparsity, what forwards of a phase see that softens: the mean of a cubic, or all of it.
_SEEN_DEPTH = {"ramp": 3 / 4, "hold": 1.0}


@dataclass(frozen=True)
class ForwardFlops:
    """Operations of one forward of one batch: all, and those of products with each parameter, by FQN."""

    total: int
    by_weight: Mapping[str, int]


def count_forward(model: nn.Module, run: Callable[[nn.Module], object]) -> ForwardFlops:
    """Count what `run(model)` multiplies and adds, by torch's own formulas: two for a multiplication with an add."""
    with torch.no_grad(), _Counter(model) as counter:
        run(model)
    return ForwardFlops(counter.total, counter.by_weight)


def training_flops(plan: Plan, forward: ForwardFlops) -> float:
    """Operations of all steps of the plan on such batches, products with masked weights taken by their live share.

    An update of masks by gradients costs a forward and a backward of which the gradient of the weights is dense, as
    RigL's paper counts it (Evci et al., 2020, appendix H); a run takes one of each a group, to save memory. The
    gradients of both operands of a product take as many operations as the product, each. Where a phase softens weights,
    the gradient of the weights is dense too.
    """
    dense = forward.total
    rest = dense - sum(forward.by_weight.get(weight.fqn, 0) for weight in plan.weights())
    of_group = [sum(forward.by_weight.get(w.fqn, 0) for w in group.weights) for group in plan.groups]
    total = 0.0
    for phase, replicas in live_shares(plan, forward.by_weight):
        for shares in replicas:
            seen = _seen(plan, phase, shares, forward.by_weight)
            sparse, of_weights = (rest + sum(f * s for f, s in zip(of_group, s, strict=True)) for s in (seen, shares))
            total += phase.num_steps * (2 * sparse + of_weights)
            total += 2 * sparse + dense if phase.drop and phase.regrow == "gradient" else 0
    return total


def _seen(plan: Plan, phase: Phase, shares: list[float], sizes: Mapping[str, int]) -> list[float]:
    """Share of each group that forwards see: less than is live where the phase softens it."""
    depth = _SEEN_DEPTH.get(phase.soften, 0.0)
    return [
        1 - depth * (1 - _live_share(plan, group, sizes)) if group in phase.grow and depth else share
        for group, share in enumerate(shares)
    ]


def live_shares(plan: Plan, sizes: Mapping[str, int]) -> Iterator[tuple[Phase, list[list[float]]]]:
    """Each phase with the live share of every group in each of its replicas, of `sizes` of its weights by FQN.

    With the operations of each weight that is the share of operations; with its elements, that of values.
    """
    sparse = [_live_share(plan, group, sizes) for group in range(len(plan.groups))]
    live = list(sparse)
    for index, phase in enumerate(plan.phases):
        replicas = [list(live) for _ in range(phase.replicas)]
        for number, shares in enumerate(replicas):
            for group in phase.grown_by(number):
                shares[group] = 1.0
        yield phase, replicas
        live = replicas[0] if phase.replicas == 1 else live
        eased = plan.eased(index)
        for group in phase.prune:
            live[group] = _live_share(eased, group, sizes)


def _live_share(plan: Plan, group: int, sizes: Mapping[str, int]) -> float:
    """Of a group whose sizes are all 0, as of a weight that no product reads, any share is none of them."""
    weights = [(sizes.get(weight.fqn, 0), weight.sparsity) for weight in plan.groups[group].weights]
    return sum(size * (1 - sparsity) for size, sparsity in weights) / max(1, sum(size for size, _ in weights))


class _Counter(TorchDispatchMode):
    """Adds up the operations of every op, and of those whose operand is a view of a parameter for that parameter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.total, self.by_weight = 0, dict[str, int]()
        self._owner = {memory_of(p): fqn for fqn, p in model.named_parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = _formula_of(func._overloadpacket)
        if formula is None and func is not torch.ops.prim.device.default:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if formula is not None:
            self._add(formula(*args, **kwargs, out_val=out), args)
        return out

    def _add(self, flops: int, args: Any) -> None:
        self.total += flops
        storages = {memory_of(leaf) for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
        for fqn in {self._owner[storage] for storage in storages if storage in self._owner}:
            if not fqn.endswith("bias"):
                self.by_weight[fqn] = self.by_weight.get(fqn, 0) + flops


def _of_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _of_groups(left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    """Each row of `left` [S, K] meets the matrix of its own group in `right` [G, K, N]; the other forms alike."""
    groups = len(left) if left.dim() == right.dim() == 3 else 1
    return 2 * groups * left.shape[-2] * left.shape[-1] * right.shape[-1]


# What torch's own table leaves out: attention on the CPU, and products of groups, as experts have.
_OWN: Mapping[Any, Formula] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _of_attention,
    torch.ops.aten._grouped_mm: _of_groups,
}


def _formula_of(packet: Any) -> Formula | None:
    return _OWN.get(packet) or flop_registry.get(packet)


def memory_of(tensor: Tensor) -> int:
    """What views of one memory share; not its address, which on the meta device is 0 for all."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]
