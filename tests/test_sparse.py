"""`gapfx.sparsify` on whole models: counts, zeros that stay zero, the plain model's state, and the masks."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gapfx
from gapfx.errors import CaptureError, PlanError, UserError
from gapfx.masks import stored_parameter
from gapfx.pattern import parse_pattern
from gapfx.plan import Group, OwnerForm, Plan, Weight
from gapfx.sparse import Sparse
from tests.models import CASES, LanguageModel, TiedPair, mlp, tokens

NAMES = ("mlp", "cnn", "transformer", "tied", "lstm")


def made(name: str, **options: Any) -> tuple[Sparse, nn.Module, tuple[Tensor, ...]]:
    """A sparsified case, a plain copy from before, and its inputs."""
    make, inputs = CASES[name][0], CASES[name][1]()
    model = make()
    plain = copy.deepcopy(model)
    settings: dict[str, Any] = {"sparsity": 0.8, **options}
    return gapfx.sparsify(model, inputs, **settings), plain, inputs


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_model_keeps_its_identity_names_and_state_keys(name: str) -> None:
    make, inputs = CASES[name][0], CASES[name][1]()
    model = make()
    before = [
        list(model.state_dict()),
        [fqn for fqn, _ in model.named_parameters()],
        [n for n, _ in model.named_modules()],
    ]
    classes = [type(module) for module in model.modules()]
    sparse = gapfx.sparsify(model, inputs)
    assert sparse.module is model
    assert before == [
        list(model.state_dict()),
        [fqn for fqn, _ in model.named_parameters()],
        [n for n, _ in model.named_modules()],
    ]
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), classes, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_every_planned_weight_has_exactly_its_kept_count_and_the_rest_is_zero(name: str) -> None:
    sparse, plain, _ = made(name)
    weights = list(sparse.plan.weights())
    assert [weight.sparsity for weight in weights] == [0.8] * len(weights)
    assert weights
    for weight in weights:
        mask, value = sparse.masks[weight.fqn], stored_parameter(sparse.module, weight.fqn)
        assert int(mask.sum()) == weight.numel - round(weight.numel * 0.8)
        assert torch.equal(value, plain.get_parameter(weight.fqn) * mask), "kept weights are as they were"
        dropped, kept = plain.get_parameter(weight.fqn)[~mask].abs().max(), plain.get_parameter(weight.fqn)[mask].abs()
        assert dropped <= kept.min(), "the smallest were dropped"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_exactly_zero_while_others_train(name: str, optimizer: str) -> None:
    sparse, _, inputs = made(name)
    steps = OPTIMIZERS[optimizer](sparse.module.parameters())
    start = {fqn: stored_parameter(sparse.module, fqn).detach().clone() for fqn in sparse.masks}
    for _ in range(5):
        steps.zero_grad()
        sparse.module(*inputs).square().mean().backward()
        steps.step()
    for fqn, mask in sparse.masks.items():
        value = stored_parameter(sparse.module, fqn).detach()
        assert value[~mask].view(torch.int32).eq(0).all(), fqn
        assert not torch.equal(value, start[fqn]), fqn


@pytest.mark.parametrize("name", NAMES)
def test_the_dense_state_loads_into_the_plain_model_and_gives_the_same_outputs(name: str) -> None:
    sparse, plain, inputs = made(name)
    state = sparse.dense_state_dict()
    plain.load_state_dict(state, strict=True)
    plain.eval()
    sparse.module.eval()
    assert torch.equal(plain(*inputs), sparse.module(*inputs))
    for weight in sparse.plan.weights():
        for fqn in (weight.fqn, *weight.aliases):
            assert not state[fqn][~sparse.masks[weight.fqn]].any()


def test_the_dense_state_is_a_copy_that_hides_what_masks_hide() -> None:
    sparse, _, _ = made("mlp")
    fqn = next(iter(sparse.masks))
    with torch.no_grad():
        stored_parameter(sparse.module, fqn).fill_(7)
    state = sparse.dense_state_dict()
    assert torch.equal(state[fqn], sparse.masks[fqn] * 7.0)
    state[fqn].fill_(9)
    assert stored_parameter(sparse.module, fqn).eq(7).all()


class WithExtraState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.notes = {"seen": [1]}

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def get_extra_state(self) -> dict[str, list[int]]:
        return self.notes

    def set_extra_state(self, state: dict[str, list[int]]) -> None:
        self.notes = state


def test_extra_state_of_a_module_is_copied_too() -> None:
    sparse = gapfx.sparsify(WithExtraState(), (torch.randn(2, 6),))
    state: dict[str, Any] = sparse.dense_state_dict()
    assert state["_extra_state"] == {"seen": [1]}
    assert state["_extra_state"] is not sparse.module.get_extra_state()


def test_masks_are_a_mapping_of_the_planned_weights() -> None:
    sparse, _, _ = made("cnn")
    fqns = [weight.fqn for weight in sparse.plan.weights()]
    assert list(sparse.masks) == fqns
    assert len(sparse.masks) == len(fqns)
    assert fqns[0] in sparse.masks
    assert {mask.dtype for mask in sparse.masks.values()} == {torch.bool}
    assert [tuple(mask.shape) for mask in sparse.masks.values()] == [weight.shape for weight in sparse.plan.weights()]
    assert "1.weight" not in sparse.masks
    with pytest.raises(KeyError, match="nothing"):
        sparse.masks["nothing"]
    assert sparse.masks.get("0.bias") is None


@pytest.mark.parametrize("name", ["mlp", "tied"])
def test_another_mask_takes_effect_on_every_use_and_zeroes_what_it_drops(name: str) -> None:
    sparse, plain, inputs = made(name, sparsity=0.5)
    weight = next(sparse.plan.weights())
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    mask[0] = True
    sparse.set_mask(weight.fqn, mask)
    assert torch.equal(sparse.masks[weight.fqn], mask)
    value = stored_parameter(sparse.module, weight.fqn)
    assert not value[~mask].any()
    plain.load_state_dict(sparse.dense_state_dict())
    assert torch.equal(plain(*inputs), sparse.module(*inputs))


@pytest.mark.parametrize(
    ("fqn", "mask", "message"),
    [
        ("0.weight", torch.ones(6, 8, dtype=torch.bool), "the mask of 0.weight must be a bool tensor of shape [8, 6]"),
        ("0.weight", torch.ones(8, 6), "must be a bool tensor of shape [8, 6]"),
        ("0.weight", torch.ones(48, dtype=torch.bool), "must be a bool tensor of shape [8, 6]"),
        ("0.bias", torch.ones(8, dtype=torch.bool), "'0.bias' is no planned weight"),
        ("nothing", torch.ones(8, dtype=torch.bool), "'nothing' is no planned weight\n  to do: `masks` lists"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_and_changes_nothing(fqn: str, mask: Tensor, message: str) -> None:
    sparse, _, _ = made("mlp")
    before = sparse.dense_state_dict()
    with pytest.raises(UserError) as caught:
        sparse.set_mask(fqn, mask)
    assert message in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in sparse.dense_state_dict().items())


def test_tied_weights_have_one_mask_and_stay_tied() -> None:
    model = TiedPair()
    sparse = gapfx.sparsify(model, (torch.randn(4, 6),), sparsity=0.5)
    assert stored_parameter(model, "second.weight") is stored_parameter(model, "first.weight")
    assert [(w.fqn, w.aliases) for w in sparse.plan.weights()] == [("first.weight", ("second.weight",))]


def test_groups_by_hand_are_the_globs_and_what_they_leave_is_dense() -> None:
    sparse = gapfx.sparsify(mlp(), (torch.randn(2, 6),), partition=["4", "0|2"])
    assert [[weight.fqn for weight in group.weights] for group in sparse.plan.groups] == [
        ["4.weight"],
        ["0.weight", "2.weight"],
    ]
    assert sparse.plan.partition == "by-hand"


def test_weights_kept_dense_are_left_as_they_were() -> None:
    sparse, plain, _ = made("mlp", dense=["first", "4"])
    assert list(sparse.masks) == ["2.weight"]
    assert torch.equal(sparse.module.get_parameter("0.weight"), plain.get_parameter("0.weight"))
    assert {weight.fqn for weight in sparse.plan.dense} >= {"0.weight", "4.weight"}


@pytest.mark.parametrize(("pattern", "sparsity"), [("1:2", 0.5), ("block:2x2", 0.75), ("block:1x2", 0.5)])
def test_masks_follow_the_pattern(pattern: str, sparsity: float) -> None:
    sparse, plain, _ = made("mlp", pattern=pattern, sparsity=sparsity, dense=["last"])
    for weight in sparse.plan.weights():
        score = plain.get_parameter(weight.fqn).abs()
        assert torch.equal(sparse.masks[weight.fqn], parse_pattern(pattern).mask(score, sparsity))


def test_random_masks_depend_on_the_seed_alone() -> None:
    drawn: list[Tensor] = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(drawn))
        sparse = gapfx.sparsify(mlp(), (torch.randn(2, 6),), criterion="random", seed=seed, sparsity=0.5)
        drawn.append(sparse.masks["2.weight"])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_plan_that_is_given_is_used_and_given_back() -> None:
    plan = Plan((Group("only", (Weight("2.weight", (8, 8), 0.75, "2:4"),)),), sparsity=0.75)
    sparse = gapfx.sparsify(mlp(), (torch.randn(2, 6),), plan=plan)
    assert dataclasses.replace(sparse.plan, owners=()) == plan
    assert sparse.plan.owners == (OwnerForm("2", "Linear", "forward"),)
    assert list(sparse.masks) == ["2.weight"]
    assert int(sparse.masks["2.weight"].sum()) == 32
    first, _, inputs = made("transformer")
    again = gapfx.sparsify(CASES["transformer"][0](), inputs, plan=Plan.from_json(first.plan.to_json()))
    assert again.plan == first.plan


def one_weight(**changes: Any) -> Plan:
    weight = dataclasses.replace(Weight("2.weight", (8, 8), 0.5), **changes)
    return Plan((Group("g", (weight,)),))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (one_weight(fqn="9.weight"), "it has no parameter '9.weight'"),
        (one_weight(shape=(4, 16)), "2.weight has shape [8, 8], the plan says [4, 16]"),
        (one_weight(pattern="3:5"), "2.weight cannot have the pattern 3:5: 8 inputs do not divide into runs of 5"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan: Plan, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        gapfx.sparsify(mlp(), (torch.randn(2, 6),), plan=plan)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": one_weight(pattern="3to5")}, "unknown pattern '3to5'"),
        ({"plan": Plan(one_weight().groups, criterion="size")}, "unknown criterion 'size'"),
        ({"criterion": "magnitud"}, "unknown criterion 'magnitud'\n  to do: did you mean 'magnitude'?"),
        ({"form": "compact"}, "form 'compact' is not supported yet"),
        ({"pattern": "2to4"}, "unknown pattern '2to4'"),
        ({"partition": ["nothing.*"]}, "the glob 'nothing.*' matches no weight"),
        ({"partition": "block"}, "strategy='block' is not one of blocks, params"),
        ({"dense": ["nothing"]}, "the glob 'nothing' matches no weight"),
        ({"sparsity": 1.0}, "sparsity 1.0 is not in [0, 1)"),
        ({"sparsity": -0.5}, "sparsity -0.5 is not in [0, 1)"),
        ({"groups": 9}, "9 groups need 9 blocks, the model has 3 blocks"),
        ({"groups": 0}, "groups=0 is not a number of groups"),
    ],
)
def test_an_option_that_cannot_be_is_refused_and_the_model_stays_plain(options: dict[str, Any], message: str) -> None:
    model = mlp()
    plain = copy.deepcopy(model)
    with pytest.raises(UserError) as caught:
        gapfx.sparsify(model, (torch.randn(2, 6),), **options)
    assert message in str(caught.value)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_forward_that_fails_on_the_example_is_a_capture_error() -> None:
    with pytest.raises(CaptureError, match="shapes cannot be multiplied"):
        gapfx.sparsify(mlp(), (torch.randn(2, 7),))


def test_keyword_arguments_reach_the_forward() -> None:
    sparse = gapfx.sparsify(LanguageModel(is_tied=False), kwargs={"tokens": tokens()})
    assert len(sparse.masks) == 4


def test_a_sparse_model_can_be_copied_and_the_copy_stands_alone() -> None:
    sparse, _, inputs = made("mlp")
    twin = copy.deepcopy(sparse.module)
    assert torch.equal(twin(*inputs), sparse.module(*inputs))
    with torch.no_grad():
        stored_parameter(sparse.module, "0.weight").zero_()
    assert not torch.equal(twin(*inputs), sparse.module(*inputs))
