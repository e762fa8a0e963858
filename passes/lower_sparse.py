"""lower-sparse: products of the weights that `choose-kernels` chose skip zeros instead of making the weight dense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from gapfx.compiler import Analysis, Rewrite, Unit, register
from gapfx.lowered import SPARSE, products
from gapfx.passes.allocate_sparsity import AllocateSparsity
from gapfx.passes.choose_kernels import ChooseKernels
from gapfx.passes.insert_masks import CAPTURE_FACTS


@register
@dataclass(frozen=True)
class LowerSparse(Rewrite):
    """Swaps the op of each chosen weight, after `lower-compact`. A grown weight, all of whose values live, runs dense.

    Weights that the plan or the options want so, but no kernel takes, stay as they are, with the reason.
    """

    name: ClassVar[str] = "lower-sparse"
    preserves: ClassVar[tuple[type[Analysis[Any]], ...]] = (*CAPTURE_FACTS, ChooseKernels)

    def apply(self, unit: Unit) -> bool:
        """Whether an op was swapped."""
        choices = unit.latest(ChooseKernels)
        wanted = {weight.fqn for weight in unit.latest(AllocateSparsity).weights() if weight.kernel == "sparse"}
        for fqn, choice in choices.by_weight.items():
            if choice.reason and (choices.is_everywhere or fqn in wanted):
                unit.refuse(fqn, f"no sparse kernel: {choice.reason}")
        chosen = {fqn for fqn, choice in choices.by_weight.items() if choice.kernel == "sparse"}
        nodes = [node for fqn, node in products(unit) if fqn in chosen and node.target in SPARSE]
        for node in nodes:
            node.target = SPARSE[node.target]
        return bool(nodes)
