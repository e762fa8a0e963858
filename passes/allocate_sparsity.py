"""allocate-sparsity: the Plan, without phases: groups of weights with their sparsity and pattern."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

from gapfx.allocation import erk, one_threshold
from gapfx.compiler import Analysis, Unit, register
from gapfx.errors import UserError
from gapfx.globs import matches, select
from gapfx.passes.find_weights import FindWeights, FoundWeight
from gapfx.passes.partition import Partition
from gapfx.pattern import parse_pattern
from gapfx.plan import DenseWeight, Group, Plan, Weight

Allocation = Literal["uniform", "erk", "global"]


@register
@dataclass(frozen=True)
class AllocateSparsity(Analysis[Plan]):
    """The plan: every prunable weight in its group, with its target sparsity.

    `uniform` gives each weight the same; `erk` and `global` share out the same total by shape and by magnitude.
    `by_weight` holds GLOB=SPARSITY entries that win over it, for the weights that match. A pattern such as 2:4 fixes
    the sparsity; weights whose shape it does not fit stay dense.
    """

    name: ClassVar[str] = "allocate-sparsity"
    sparsity: float = 0.9
    allocation: Allocation = "uniform"
    pattern: str = "unstructured"
    by_weight: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        parse_pattern(self.pattern)
        for text in (str(self.sparsity), *(entry.rpartition("=")[2] for entry in self.by_weight)):
            _parse_sparsity(text)

    def compute(self, unit: Unit) -> Plan:
        """Raises UserError when the pattern fits no weight or an override matches none."""
        pattern = parse_pattern(self.pattern)
        refused: dict[str, str] = {}
        fitting: dict[str, FoundWeight] = {}
        found = unit.latest(FindWeights)
        for weight in found.prunable:
            reason = pattern.refusal(weight.shape)
            if reason:
                refused[weight.fqn] = f"pattern {self.pattern}: {reason}"
            else:
                fitting[weight.fqn] = weight
        if not fitting:
            first = next(iter(refused.items()), ("", "the model has no prunable weight"))
            raise UserError(f"the pattern {self.pattern} fits no weight", where=": ".join(first), fix="another pattern")
        sparsity = self._sparsities(unit, fitting, pattern.fixed_sparsity)
        kept_dense = [item for item in found.dense if len(item.shape) > 1]
        kept_dense += [
            DenseWeight(item.fqn, item.shape, refused[item.fqn]) for item in found.prunable if item.fqn in refused
        ]
        groups = self._groups(unit, fitting, sparsity)
        total = sum(weight.numel for weight in fitting.values())
        return Plan(
            groups=groups,
            dense=tuple(kept_dense),
            sparsity=sum(sparsity[fqn] * weight.numel for fqn, weight in fitting.items()) / total
            if self.by_weight or pattern.fixed_sparsity is not None
            else self.sparsity,
            partition=cast(Partition, unit.chosen(Partition)).strategy,
            allocation=self.allocation,
        )

    def _groups(
        self, unit: Unit, fitting: Mapping[str, FoundWeight], sparsity: Mapping[str, float]
    ) -> tuple[Group, ...]:
        groups: list[Group] = []
        for name, fqns in unit.latest(Partition):
            own = [fitting[fqn] for fqn in fqns if fqn in fitting]
            weights = [Weight(w.fqn, w.shape, sparsity[w.fqn], self.pattern, w.aliases) for w in own]
            if weights:
                groups.append(Group(name, tuple(weights)))
        return tuple(groups)

    def _sparsities(self, unit: Unit, weights: Mapping[str, FoundWeight], fixed: float | None) -> dict[str, float]:
        if fixed is not None:
            return dict.fromkeys(weights, fixed)
        overrides = self._overrides(weights)
        rest = {fqn: weight.shape for fqn, weight in weights.items() if fqn not in overrides}
        if self.allocation == "erk":
            shares = erk(rest, self.sparsity)
        elif self.allocation == "global":
            tensors = dict(unit.capture.model.named_parameters())
            shares = one_threshold({fqn: tensors[fqn] for fqn in rest}, self.sparsity)
        else:
            shares = dict.fromkeys(rest, self.sparsity)
        return {fqn: overrides.get(fqn, shares.get(fqn, 0.0)) for fqn in weights}

    def _overrides(self, weights: Mapping[str, FoundWeight]) -> dict[str, float]:
        found: dict[str, float] = {}
        for entry in self.by_weight:
            glob, _, value = entry.rpartition("=")
            select(glob, weights, option="by_weight of allocate-sparsity")
            found |= {fqn: _parse_sparsity(value) for fqn in weights if matches(glob, fqn)}
        return found


def _parse_sparsity(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise UserError(f"sparsity {text} is not in [0, 1)", fix="sparsity is the share of zeros, such as 0.9")
    return value
