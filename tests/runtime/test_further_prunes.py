"""Prunes of weights that are sparse already, on the way to their target."""

from __future__ import annotations

import dataclasses

import pytest

from gapfx.criterion import CRITERIA
from gapfx.masks import unpack
from gapfx.plan import Group, Plan
from gapfx.runtime.grow_prune import prune, start_masks
from tests.runtime.test_grow_prune import A, fresh


@pytest.fixture
def zeros_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A criterion that rates zeros highest, as one that goes by the size of a gradient may."""
    monkeypatch.setitem(CRITERIA._entries, "zeros-first", lambda weight, generator: -weight.detach().abs())  # pyright: ignore[reportPrivateUsage]


@pytest.mark.usefixtures("zeros_first")
@pytest.mark.parametrize("pattern", ["unstructured", "block:1x2"])
@pytest.mark.parametrize("criterion", ["random", "magnitude", "zeros-first"])
def test_a_further_prune_revives_nothing_whatever_the_criterion_says_of_zeros(criterion: str, pattern: str) -> None:
    def pruned_to(sparsity: float) -> Plan:
        weight = dataclasses.replace(A, sparsity=sparsity, pattern=pattern)
        return Plan((Group("g", (weight,)),), criterion=criterion)

    state = fresh(plan=pruned_to(0.4))
    start_masks(state, pruned_to(0.4), 0)
    for state.step, sparsity in enumerate((0.6, 0.8)):
        before = unpack(state.bits["a"], A.shape)
        facts = prune(state, pruned_to(sparsity), (0,), seed=9)["a"]
        after = unpack(state.bits["a"], A.shape)
        assert facts.kept == int(after.sum()) == round(100 * (1 - sparsity))
        assert not (after & ~before).any()
