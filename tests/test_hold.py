"""Masks in a loop of one's own: zeros hold, phases are followed, and what cannot be held is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gapfx
from gapfx.errors import UserError
from gapfx.plan import Group, Phase, Plan, Weight

A, B = Weight("0.weight", (16, 8), 0.75), Weight("2.weight", (4, 16), 0.75)
PLAN = Plan((Group("first", (A,)), Group("last", (B,))), sparsity=0.75)
TWO_OF_FOUR = Plan(tuple(Group(w.fqn, (dataclasses.replace(w, sparsity=0.5, pattern="2:4"),)) for w in (A, B)))


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(32, 8, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
        optimizer.step()


def some_masks() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {w.fqn: torch.rand(w.shape, generator=generator) < 0.25 for w in (A, B)}


def alive(model: nn.Module, masks: dict[str, Tensor]) -> int:
    return sum(int(model.get_parameter(fqn).detach()[~mask].count_nonzero()) for fqn, mask in masks.items())


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_hold_exactly_and_without_holding_they_do_not(name: str) -> None:
    for is_held in (True, False):
        model, masks = model_of(), some_masks()
        optimizer = OPTIMIZERS[name](model.parameters())
        held = gapfx.hold(model, optimizer, masks=masks)
        assert alive(model, masks) == 0
        if not is_held:
            held.remove()
        train(model, optimizer, 20)
        assert (alive(model, masks) == 0) is is_held
        assert any(bool(model.get_parameter(fqn).detach()[mask].abs().sum() > 0) for fqn, mask in masks.items())


def test_a_masked_weight_moves_nothing_through_momentum() -> None:
    model, masks = model_of(), some_masks()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    gapfx.hold(model, optimizer, masks=masks)
    train(model, optimizer, 5)
    for fqn, mask in masks.items():
        state = optimizer.state[model.get_parameter(fqn)]
        assert not state["exp_avg"][~mask].count_nonzero()


def test_masks_of_a_sparse_checkpoint_are_its_zeros() -> None:
    model, masks = model_of(), some_masks()
    for fqn, mask in masks.items():
        model.get_parameter(fqn).data *= mask
    found = gapfx.masks_from_zeros(model)
    assert found.keys() == masks.keys()
    assert all(torch.equal(found[fqn], mask) for fqn, mask in masks.items())
    with pytest.raises(UserError, match="no weight of the model has 30% zeros"):
        gapfx.masks_from_zeros(model_of())


def phased(method: str = "gap") -> Plan:
    return gapfx.with_schedule(PLAN, method, gapfx.Budget(2, 5, 10))


def test_a_plan_grows_and_prunes_one_group_after_the_other() -> None:
    model = model_of()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    held = gapfx.hold(model, optimizer, plan=phased())
    seen: list[tuple[bool, bool]] = []
    for step in range(30):
        seen.append((bool(held.masks[A.fqn].all()), bool(held.masks[B.fqn].all())))
        assert alive(model, held.masks) == 0
        train(model, optimizer, 1, step)
    assert (
        seen
        == [(True, False)] * 5 + [(False, True)] * 5 + [(True, False)] * 5 + [(False, True)] * 5 + [(False, False)] * 10
    )
    assert held.sparsity == pytest.approx(0.75)
    assert {fqn: int(mask.sum()) for fqn, mask in held.masks.items()} == {A.fqn: 32, B.fqn: 16}


def test_a_prune_keeps_the_largest_and_the_state_is_reset_where_the_plan_says_so() -> None:
    for state in ("reset", "carry"):
        model, plan = (
            model_of(),
            dataclasses.replace(phased(), phases=tuple(dataclasses.replace(p, state=state) for p in phased().phases)),
        )
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        held = gapfx.hold(model, optimizer, plan=plan)
        train(model, optimizer, 5)
        weight = model.get_parameter(A.fqn).detach()
        assert int(weight.count_nonzero()) == 32
        assert bool(optimizer.state) is (state == "carry")
        if state == "carry":
            assert not optimizer.state[model.get_parameter(A.fqn)]["exp_avg"][~held.masks[A.fqn]].count_nonzero()


def test_it_goes_on_from_its_state_to_the_same_numbers(tmp_path: Path) -> None:
    def begun() -> tuple[nn.Module, torch.optim.Optimizer, gapfx.Held]:
        model = model_of()
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        return model, optimizer, gapfx.hold(model, optimizer, plan=phased("acdc"))

    model, optimizer, held = begun()
    train(model, optimizer, 7)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "masks": held.state_dict()}
    torch.save(state, tmp_path / "state.pt")
    train(model, optimizer, 20, 7)
    again, its_optimizer, its_masks = begun()
    read = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(read["model"])
    its_optimizer.load_state_dict(read["optimizer"])
    its_masks.load_state_dict(read["masks"])
    train(again, its_optimizer, 20, 7)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_model_of_a_checkpoint_goes_on_with_its_state_and_loses_nothing() -> None:
    model = model_of()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    held = gapfx.hold(model, optimizer, plan=phased())
    train(model, optimizer, 7)
    state, weights = held.state_dict(), {fqn: value.clone() for fqn, value in model.state_dict().items()}
    for given in (state, None):
        again = model_of()
        again.load_state_dict(weights)
        found = gapfx.hold(again, OPTIMIZERS["adamw"](again.parameters()), plan=phased(), state=given)
        is_whole = all(torch.equal(value, weights[fqn]) for fqn, value in again.state_dict().items())
        # The masks that the plan starts with are others: they zero what was trained.
        assert is_whole is (given is not None)
        assert (found.num_steps, found.phase) == ((7, 1) if given else (0, 0))
    with pytest.raises(UserError, match="the masks are those of another model"):
        gapfx.hold(model, optimizer, masks={A.fqn: held.masks[A.fqn]}, state=state)


def test_a_compiled_model_is_held_by_the_names_of_the_model_inside() -> None:
    model, masks = model_of(), some_masks()
    held = gapfx.hold(torch.compile(model), OPTIMIZERS["sgd"](model.parameters()), masks=masks)  # pyright: ignore[reportArgumentType]
    assert held.model is model
    assert alive(model, masks) == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "takes either masks or a plan"),
        ({"masks": {}, "plan": PLAN}, "takes either masks or a plan"),
        ({"plan": PLAN}, "the plan has no phases"),
        ({"masks": {"9.weight": torch.ones(2, 2)}}, "the model has no parameter '9.weight' of shape"),
        ({"masks": {"0.weight": torch.ones(2, 2)}}, "the model has no parameter '0.weight' of shape"),
        ({"plan": gapfx.with_schedule(PLAN, "rigl", gapfx.Budget(2, 90, 10))}, "drop of phase 'update 1' needs"),
        ({"plan": gapfx.with_schedule(PLAN, "st3", gapfx.Budget(1, 5, 5))}, "soften of phase"),
        (
            {"plan": dataclasses.replace(PLAN, criterion="snip", phases=(Phase("p", 0, 5),))},
            "a gradient, needs gapfx's own runtime",
        ),
        (
            {"plan": gapfx.with_schedule(PLAN, "snip", gapfx.Budget(1, 5, 5))},
            "the criterion 'snip', which takes a gradient, needs gapfx's own runtime",
        ),
        (
            {"plan": dataclasses.replace(PLAN, allocation="global", phases=(Phase("p", 0, 5),))},
            "one threshold over a group needs gapfx's own runtime",
        ),
        (
            {"plan": gapfx.with_schedule(TWO_OF_FOUR, "gmp", gapfx.Budget(1, 5, 5))},
            "0.weight has the pattern 2:4, which cannot be reached step by step",
        ),
    ],
)
def test_what_cannot_be_held_is_refused(given: dict[str, object], message: str) -> None:
    model = model_of()
    with pytest.raises(UserError, match=message):
        gapfx.hold(model, OPTIMIZERS["sgd"](model.parameters()), **given)  # pyright: ignore[reportArgumentType]


def test_masks_of_another_model_are_refused() -> None:
    model = model_of()
    held = gapfx.hold(model, OPTIMIZERS["sgd"](model.parameters()), masks=some_masks())
    with pytest.raises(UserError, match="the masks are those of another model"):
        held.load_state_dict({"version": 1, "num_steps": 0, "phase": 0, "bits": {}})
