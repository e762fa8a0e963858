"""The plan that the analyses make."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gapfx.compiler import Unit
from gapfx.errors import UserError
from gapfx.passes import AllocateSparsity, Partition
from gapfx.plan import Plan
from tests.models import LanguageModel, TiedPair, captured, mlp, resnet50, resnet_input, tokens


def plan_of(model: nn.Module, *inputs: Tensor, groups: int = 2, **options: Any) -> Plan:
    unit = Unit(captured(model, *inputs))
    unit.choose(Partition(groups=groups))
    plan = unit.fact(AllocateSparsity(**options))
    plan.validate()
    plan.check_model({fqn: tuple(p.shape) for fqn, p in model.named_parameters(remove_duplicate=False)})
    return plan


def total(plan: Plan) -> float:
    weights = list(plan.weights())
    return sum(weight.sparsity * weight.numel for weight in weights) / sum(weight.numel for weight in weights)


def sparsities(plan: Plan) -> dict[str, float]:
    return {weight.fqn: weight.sparsity for weight in plan.weights()}


def test_uniform_gives_every_weight_the_target() -> None:
    plan = plan_of(mlp(), torch.randn(2, 6), sparsity=0.75)
    assert sparsities(plan) == {"0.weight": 0.75, "2.weight": 0.75, "4.weight": 0.75}
    assert (plan.sparsity, plan.allocation, plan.partition, plan.phases) == (0.75, "uniform", "blocks", ())
    assert [group.name for group in plan.groups] == ["0+2", "4"]


@pytest.mark.parametrize("allocation", ["erk", "global"])
def test_other_allocations_share_out_the_same_total(allocation: str) -> None:
    plan = plan_of(resnet50(), resnet_input(), groups=4, sparsity=0.9, allocation=allocation)
    numel = sum(weight.numel for weight in plan.weights())
    assert total(plan) == pytest.approx(0.9, abs=1 / numel)
    assert len(set(sparsities(plan).values())) > 5
    assert all(round(weight.sparsity * weight.numel) < weight.numel for weight in plan.weights())


def test_global_uses_the_weights_as_they_are() -> None:
    model = mlp()
    with torch.no_grad():
        dict(model.named_parameters())["0.weight"].mul_(1e-3)
    found = sparsities(plan_of(model, torch.randn(2, 6), sparsity=0.4, allocation="global"))
    assert found["0.weight"] == pytest.approx(47 / 48)
    assert max(found["2.weight"], found["4.weight"]) < 0.3


def test_overrides_win_and_the_last_one_that_matches_counts() -> None:
    plan = plan_of(mlp(), torch.randn(2, 6), sparsity=0.9, by_weight=("*=0.5", "4=0"))
    assert sparsities(plan) == {"0.weight": 0.5, "2.weight": 0.5, "4.weight": 0.0}
    assert plan.sparsity == pytest.approx(0.5 * 112 / 136)


def test_global_shares_out_again_at_prunes_what_has_no_pattern_and_no_override() -> None:
    def pools(allocation: str, *by_weight: str, pattern: str = "unstructured") -> list[list[str]]:
        options: dict[str, Any] = {"allocation": allocation, "by_weight": by_weight, "pattern": pattern}
        plan = plan_of(mlp(), torch.randn(2, 6), groups=1, sparsity=0.5, **options)
        return [[weight.fqn for weight in pool] for group in plan.groups for pool in plan.pools(group)]

    each = [["0.weight"], ["2.weight"], ["4.weight"]]
    assert pools("global") == [["0.weight", "2.weight", "4.weight"]]
    assert pools("global", "2.*=0.5") == [["0.weight", "4.weight"], ["2.weight"]]
    assert pools("global", pattern="block:1x2") == pools("erk") == pools("uniform", "2.*=0.5") == each


def test_an_override_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="'9' matches no weight\n  where: option by_weight"):
        plan_of(mlp(), torch.randn(2, 6), by_weight=("9=0.5",))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("0", "the override '0' names no weights"),
        ("=0.5", "the override '=0.5' names no weights"),
        ("0=", "sparsity  is not in"),
        ("0=1.0", "sparsity 1.0 is not in"),
        ("0=-1", "sparsity -1 is not in"),
        ("0=nan", "sparsity nan is not in"),
    ],
)
def test_an_override_that_cannot_be_read_is_refused(entry: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        AllocateSparsity(by_weight=(entry,))


def test_n_of_m_fixes_the_sparsity_and_keeps_what_it_does_not_fit_dense() -> None:
    plan = plan_of(mlp(), torch.randn(2, 6), sparsity=0.9, pattern="2:4")
    assert [(w.fqn, w.sparsity, w.pattern) for w in plan.weights()] == [
        ("2.weight", 0.5, "2:4"),
        ("4.weight", 0.5, "2:4"),
    ]
    assert plan.sparsity == 0.5
    [refused] = [item for item in plan.dense if item.fqn == "0.weight"]
    assert refused.reason == "pattern 2:4: 6 inputs do not divide into runs of 4"


def test_a_group_whose_weights_are_all_refused_is_dropped() -> None:
    plan = plan_of(mlp(), torch.randn(2, 6), groups=3, pattern="2:4")
    assert [group.name for group in plan.groups] == ["2", "4"]


def test_a_pattern_that_fits_no_weight_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    with pytest.raises(UserError, match=r"the pattern 2:4 fits no weight\n  where: 0.weight: pattern 2:4: 6 inputs"):
        plan_of(model, torch.randn(2, 6), pattern="2:4")


def test_dense_weights_of_two_dimensions_are_listed_with_their_reasons() -> None:
    plan = plan_of(LanguageModel(), tokens())
    assert {item.fqn for item in plan.dense} == {"tokens.weight", "positions"}
    assert all(item.reason and len(item.shape) > 1 for item in plan.dense)


def test_aliases_of_tied_weights_are_in_the_plan() -> None:
    [weight] = plan_of(TiedPair(), torch.randn(2, 6), groups=1).weights()
    assert (weight.fqn, weight.aliases, weight.numel) == ("first.weight", ("second.weight",), math.prod((6, 6)))
