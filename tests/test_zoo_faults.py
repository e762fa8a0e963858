"""The zoo's checks see faults of plans, and what a model varies by hides no mismatch."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor, nn

from gapfx.passes.find_blocks import Block
from gapfx.plan import DenseWeight, Group, Plan, Weight
from tools.zoo_cases.cases import Case, Inputs, kind_of
from tools.zoo_cases.checks import check
from tools.zoo_cases.partitions import faults_of, pieces_of
from tools.zoo_cases.running import Difference
from tools.zoo_cases.two_ranks import check_two_ranks


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(6, 6)
        self.again.weight = self.first.weight


class Scales(nn.Module):
    """No matrix at all."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Table(nn.Module):
    """A matrix that no matrix product uses."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table.sum(0)


class Drifts(Net):
    """Every call gives something else."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = itertools.count()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + next(self.calls)


class Mixes(Net):
    """Rows of the batch meet, so that two halves are not one whole, but each rank has its own half anyway."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class Escapes(Net):
    """Reads a weight past its attribute, so that no mask is seen."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ dict(self.named_parameters())["first.weight"].T


def case(kind: type[nn.Module]) -> Case:
    return Case("made", "net", kind.__name__, kind, lambda size: Inputs((torch.randn(size, 6),)))


def group(name: str, *weights: Weight) -> Group:
    return Group(name, weights)


FIRST, LAST = Weight("first.weight", (6, 6), 0.5), Weight("last.weight", (4, 6), 0.5)
BOTH = dataclasses.replace(FIRST, aliases=("again.weight",))
DENSE = DenseWeight("last.weight", (4, 6), "because")


@pytest.mark.parametrize(
    ("kind", "plan", "found"),
    [
        (Net, Plan((group("a", FIRST, LAST),)), []),
        (Net, Plan((group("a", FIRST),), (DENSE,)), []),
        (Net, Plan((group("a", FIRST),)), ["last.weight is neither in a group nor dense"]),
        (Net, Plan((group("a", FIRST, LAST),), (DENSE,)), ["last.weight is both in a group and dense"]),
        (Net, Plan((group("a", FIRST, LAST), group("b", LAST))), ["last.weight is in 2 groups"]),
        (Net, Plan((group("a", FIRST, LAST), group("b"))), ["group b is empty"]),
        (Tied, Plan((group("a", BOTH, LAST),)), []),
        (
            Tied,
            Plan((group("a", FIRST, LAST),)),
            ["first.weight is tied under 2 names, of which the plan knows first.weight"],
        ),
        (Scales, Plan(()), []),
    ],
)
def test_faults_of_a_plan_are_sentences(kind: type[nn.Module], plan: Plan, found: list[str]) -> None:
    model = kind()
    matrices = {fqn for fqn, value in model.named_parameters(remove_duplicate=False) if value.ndim >= 2}
    assert list(faults_of(model, plan, matrices)) == found


def test_a_block_may_be_split_only_when_it_is_larger_than_a_mean_group() -> None:
    plan = Plan((group("a", FIRST), group("b", LAST)))
    large, small = Block("both", "", ("first.weight", "last.weight")), Block("first", "", ("first.weight",))
    assert pieces_of(plan, (large, small)) == (["both (60 weights) is in 2 groups"], [])
    three = Plan((*plan.groups, group("c", Weight("big", (100, 6), 0.5))))
    assert pieces_of(three, (large, small)) == ([], ["both (60 weights) is in 2 groups"])


def test_a_model_without_matrices_passes_and_one_whose_matrix_is_not_found_fails() -> None:
    assert check(case(Scales)).status == "passed"
    assert "the model has no prunable weight" in check(case(Table)).failures["capture"]


def test_a_model_that_varies_a_lot_fails_instead_of_being_forgiven() -> None:
    result = check(case(Drifts))
    assert result.facts["varies"]
    assert "the plain model differs from itself by" in result.failures["train"]


@pytest.mark.parametrize(
    ("worst", "varies", "is_equal"),
    [(9e-6, 0.0, True), (2e-5, 0.0, False), (9e-5, 1e-5, True), (2e-4, 1e-5, False), (2e-3, 1.0, False)],
)
def test_a_model_is_forgiven_what_it_varies_by_up_to_a_limit(worst: float, varies: float, is_equal: bool) -> None:
    assert Difference(worst, "x").is_equal(varies) is is_equal


@pytest.mark.parametrize(
    ("names", "kind"),
    [((), "made"), (("input_ids",), "text"), (("input_ids", "pixel_values"), "multimodal")],
)
def test_inputs_say_what_kind_of_model_it_is(names: tuple[str, ...], kind: str) -> None:
    assert kind_of(case(Net), Inputs((), dict.fromkeys(names))) == kind
    assert kind_of(dataclasses.replace(case(Net), kind="CNN"), Inputs((), dict.fromkeys(names))) == "CNN"


@pytest.mark.distributed
def test_two_ranks_pass_and_a_mask_that_is_not_seen_fails_there_too() -> None:
    assert check_two_ranks(case(Mixes)).failures == {}
    assert "gradients differ by" in check_two_ranks(case(Escapes)).failures["two ranks"]
