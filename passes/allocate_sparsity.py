"""allocate-sparsity: the Plan, without phases: groups of weights with their sparsity and pattern."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

from gapfx.allocation import erk, one_threshold
from gapfx.compiler import Analysis, Unit, register
from gapfx.errors import UserError
from gapfx.globs import select
from gapfx.passes.find_weights import FindWeights, FoundWeight
from gapfx.passes.partition import Partition
from gapfx.pattern import parse_pattern
from gapfx.plan import DenseWeight, Group, Plan, Weight

Allocation = Literal["uniform", "erk", "global"]


@register
@dataclass(frozen=True)
class AllocateSparsity(Analysis[Plan]):
    """The plan: every prunable weight in its group, with its target sparsity.

    `uniform` gives each weight the same; `erk` and `global` share out the same total by shape and by magnitude. With
    `global` each prune shares out a group's total again, between its unstructured weights without an entry below.
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
        _parse_sparsity(str(self.sparsity))
        for entry in self.by_weight:
            _split_override(entry)

    def compute(self, unit: Unit) -> Plan:
        """Raises UserError when the pattern fits no weight or an override matches none."""
        found, pattern = unit.latest(FindWeights), parse_pattern(self.pattern)
        refusals = {weight.fqn: pattern.refusal(weight.shape) for weight in found.prunable}
        fitting = {weight.fqn: weight for weight in found.prunable if refusals[weight.fqn] is None}
        refused = [
            DenseWeight(weight.fqn, weight.shape, f"pattern {self.pattern}: {refusals[weight.fqn]}")
            for weight in found.prunable
            if weight.fqn not in fitting
        ]
        if not fitting:
            where = f"{refused[0].fqn}: {refused[0].reason}" if refused else "the model has no prunable weight"
            raise UserError(f"the pattern {self.pattern} fits no weight", where=where, fix="take another pattern")
        sparsity = self._sparsities(unit, fitting, pattern.fixed_sparsity)
        return Plan(
            groups=self._groups(unit, fitting, sparsity),
            dense=(*(item for item in found.dense if len(item.shape) > 1), *refused),
            sparsity=_mean(sparsity, fitting) if self.by_weight or pattern.fixed_sparsity else self.sparsity,
            partition=cast(Partition, unit.chosen(Partition)).strategy,
            allocation=self.allocation,
            own_sparsity=tuple(self._overrides(fitting)) if self.allocation == "global" else (),
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
            glob, value = _split_override(entry)
            found |= dict.fromkeys(select(glob, weights, option="by_weight of allocate-sparsity"), value)
        return found


def _mean(sparsity: Mapping[str, float], weights: Mapping[str, FoundWeight]) -> float:
    """Share of zeros over all weights together."""
    zeros = sum(sparsity[fqn] * weight.numel for fqn, weight in weights.items())
    return zeros / sum(weight.numel for weight in weights.values())


def _split_override(entry: str) -> tuple[str, float]:
    glob, _, value = entry.rpartition("=")
    if not glob:
        raise UserError(f"the override {entry!r} names no weights", fix="write it as GLOB=SPARSITY, such as fc*=0.5")
    return glob, _parse_sparsity(value)


def _parse_sparsity(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise UserError(f"sparsity {text} is not in [0, 1)", fix="sparsity is the share of zeros, such as 0.9")
    return value
