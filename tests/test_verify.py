"""Masked models are verified against their plain code on a second batch; owners that differ are demoted."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gapfx.errors import UserError
from gapfx.masks import bits_of, count_kept
from gapfx.sparse import Compiled, CompileOptions, compile_model
from tests.kernels.needs import needs_kernels


def compiled(model: nn.Module, first: Tensor, second: Tensor) -> Compiled:
    torch.manual_seed(0)
    return compile_model(model, lambda m: m(first), CompileOptions(0.5, groups=1), check=lambda m: m(second))


def forms(made: Compiled) -> dict[str, str]:
    return {owner.fqn: owner.form for owner in made.plan.owners}


class Drawing(nn.Linear):
    """A trace keeps the number that was drawn while it was made, which no rule sees."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight) * random.random()


class Hidden(nn.Linear):
    """Goes around the attribute for large batches."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight if len(input) < 4 else vars(self)["_parameters"]["weight"]
        return F.linear(input, weight)


class Restless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + torch.randn((), generator=GENERATOR)


GENERATOR = torch.Generator().manual_seed(1)


class Reader(nn.Module):
    """Reads the weight of its child around the attribute, for large batches."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if len(x) < 4 else x @ vars(self.inner)["_parameters"]["weight"]


def test_what_matches_keeps_its_form_and_gets_no_note() -> None:
    made = compiled(nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4)), torch.randn(2, 4), torch.randn(5, 4))
    assert forms(made) == {"0": "forward", "1": "read"}
    assert made.notes == ()


def test_a_constant_in_a_trace_demotes_its_owner_to_reads() -> None:
    made = compiled(nn.Sequential(nn.Linear(4, 4), Drawing(4, 4)), torch.randn(2, 4), torch.randn(2, 4))
    assert forms(made) == {"0": "forward", "1": "read"}
    reason = "its masked forward differed, in form forward, from its forward on zeroed weights"
    assert made.plan.owners[1].reason == reason
    assert made.notes == (f"1: masked in form read, since {reason}",)


@needs_kernels
def test_the_kernel_of_a_demoted_owner_is_no_longer_chosen() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Drawing(4, 4))
    options = CompileOptions(0.5, groups=1, form="compact", kernels="sparse", calibrate=False)
    torch.manual_seed(0)
    made = compile_model(model, lambda m: m(torch.ones(2, 4)), options, check=lambda m: m(torch.ones(3, 4)))
    wanted = {"0.weight": "sparse", "1.weight": "expand"}
    assert {weight.fqn: weight.kernel for weight in made.plan.weights()} == wanted
    assert {fqn: choice.kernel for fqn, choice in made.choices.by_weight.items()} == wanted
    assert made.choices.by_weight["1.weight"].reason


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(4, 4), Hidden(4, 4)), Reader()], ids=["own", "child's"])
def test_a_read_around_the_attribute_demotes_its_owner_to_in_place(model: nn.Module) -> None:
    made = compiled(model, torch.randn(2, 4), torch.randn(5, 4))
    fqn = "inner" if isinstance(model, Reader) else "1"
    assert forms(made)[fqn] == "in-place"
    assert any(note.startswith(f"{fqn}: masked in form in-place") for note in made.notes)
    assert forms(made).get("0", "forward") == "forward"


def test_a_demoted_owner_masks_what_it_leaked() -> None:
    model = nn.Sequential(Hidden(4, 4, bias=False))
    x = torch.randn(5, 4)
    made = compiled(model, torch.randn(2, 4), x)
    bits_of(model, "0.weight").zero_()
    assert torch.equal(made.module(x), torch.zeros(5, 4))


def test_weights_masks_and_random_states_are_as_before() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(), nn.BatchNorm1d(6), nn.Linear(6, 4))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(3, 4)
    state = torch.get_rng_state()
    made = compile_model(model, lambda m: m(x), CompileOptions(0.5, groups=1), check=lambda m: m(x))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in made.module.state_dict().items())
    assert [count_kept(bits_of(model, weight.fqn)) for weight in made.plan.weights()] == [24, 24]


def test_a_model_that_does_not_repeat_itself_is_not_verified_and_a_note_says_so() -> None:
    made = compiled(Restless(), torch.randn(2, 4), torch.randn(2, 4))
    assert made.notes == ("the model: the same seed gives other numbers, so its masks are not verified",)
    assert forms(made) == {"inner": "forward"}


def test_a_batch_that_the_model_cannot_take_is_told() -> None:
    with pytest.raises(UserError, match="the forward that verifies the masks failed: RuntimeError"):
        compiled(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4), torch.randn(2, 5))
