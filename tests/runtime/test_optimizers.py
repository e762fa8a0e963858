"""Which optimizers an engine takes, and what they are shown of the parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gapfx.errors import UserError
from gapfx.runtime.checkpoint import load_checkpoint, save_checkpoint
from gapfx.runtime.engine import EngineOptions
from gapfx.runtime.optimizers import check_optimizer, make_optimizer
from gapfx.runtime.state import OptimizerState
from tests.runtime.test_engine import (
    batches,
    check_two_engines,
    largest_difference,
    make_model,
    opened,
    plain_weights,
    run,
    taken,
)
from tests.runtime.test_engine import weights_of as weights_in

pytestmark = pytest.mark.usefixtures("in_process_group")

Factory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

ELEMENTWISE: dict[str, Factory] = {
    "Adadelta": lambda params: torch.optim.Adadelta(params),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-2, initial_accumulator_value=0.1),
    "Adam": lambda params: torch.optim.Adam(params, lr=1e-2, amsgrad=True),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "AdamW fused": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "Adamax": lambda params: torch.optim.Adamax(params, lr=1e-2),
    "ASGD": lambda params: torch.optim.ASGD(params, lr=1e-2),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=1e-2),
    "RAdam": lambda params: torch.optim.RAdam(params, lr=1e-2),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=1e-2, momentum=0.9, centered=True),
    "Rprop": lambda params: torch.optim.Rprop(params, lr=1e-2),
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, nesterov=True),
}


class Lars(torch.optim.Optimizer):
    """A step as long as the weight."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * parameter.norm() / parameter.grad.norm() * parameter.grad


def rates(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": params[:1]}, {"params": params[1:], "lr": Tensor([1.0, 2.0])}])


NEVER: dict[str, tuple[Factory, str]] = {
    "Muon": (lambda params: torch.optim.Muon(params), "Muon moves elements that are 0 and have no gradient"),
    "Adafactor": (lambda params: torch.optim.Adafactor(params), r"keeps row_var in the shape \[6, 1\]"),
    "LBFGS": (lambda params: torch.optim.LBFGS(params), "LBFGS fails on a small weight: TypeError"),
    "one group of two": (rates, "SGD fails on a small weight"),
}


@pytest.mark.parametrize("factory", ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_optimizers_of_elements_are_taken_and_left_as_they_are(factory: Factory) -> None:
    weight = nn.Parameter(torch.ones(3, 2))
    optimizer = factory([weight])
    state = str(optimizer.state)
    check_optimizer(optimizer, in_parts=True)
    assert torch.equal(weight, torch.ones(3, 2))
    assert weight.grad is None
    assert optimizer.param_groups[0]["params"] == [weight]
    assert str(optimizer.state) == state


@pytest.mark.parametrize("in_parts", [True, False])
@pytest.mark.parametrize(("factory", "reason"), NEVER.values(), ids=NEVER)
def test_optimizers_that_break_a_sparse_training_are_refused(factory: Factory, reason: str, in_parts: bool) -> None:
    with pytest.raises(UserError, match=reason):
        check_optimizer(factory([nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2, 2))]), in_parts=in_parts)


def test_an_optimizer_that_takes_norms_is_refused_for_parts_of_weights_alone() -> None:
    optimizer = Lars([nn.Parameter(torch.ones(3, 2))])
    check_optimizer(optimizer, in_parts=False)
    with pytest.raises(UserError, match="updates an element by more than its own gradients"):
        check_optimizer(optimizer, in_parts=True)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("factory", ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_steps_equal_plain_torch_also_in_a_second_engine(factory: Factory, zero: int) -> None:
    check_two_engines(factory, zero)


@pytest.mark.parametrize("zero", [1, 3])
def test_an_engine_with_shares_refuses_an_optimizer_of_whole_weights(zero: int) -> None:
    with pytest.raises(UserError, match="Lars updates an element by more than its own gradients"):
        opened(make_model(), Lars, EngineOptions(4, zero_stage=zero))


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_parameters_are_shown_in_their_shape_at_every_stage(zero: int) -> None:
    seen: list[tuple[int, ...]] = []

    def no_decay_of_vectors(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        seen.extend(tuple(p.shape) for p in params)
        vectors, matrices = [p for p in params if p.ndim < 2], [p for p in params if p.ndim >= 2]
        groups = [{"params": matrices, "weight_decay": 0.5}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=1e-2)

    engine = opened(make_model(), no_decay_of_vectors, EngineOptions(4, 2, 0.0, zero_stage=zero))
    assert seen == [tuple(p.shape) for p in make_model().parameters()]
    run(engine, batches(3))
    assert largest_difference(weights_in(engine), plain_weights(no_decay_of_vectors, 3, 0.0)) <= 1e-6
    engine.close()


def test_a_stand_in_takes_no_memory() -> None:
    cut: Any = nn.Parameter(torch.empty(0))
    cut.ds_shape = torch.Size([1000, 1000])
    shown: list[nn.Parameter] = []

    def keep(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        shown.extend(params)
        return torch.optim.SGD(params, lr=1.0)

    optimizer = make_optimizer(keep, [cut])
    assert shown[0].shape == (1000, 1000)
    assert shown[0].untyped_storage().nbytes() == 4
    assert optimizer.param_groups[0]["params"][0] is cut


class Counting(torch.optim.Optimizer):
    """Adam without weight decay, whose number of steps stands in its parameter groups, as in a schedule-free AdamW.

    `as_tensor`: as a tensor that is changed in place. `late`: it is not there before the first step.
    """

    def __init__(self, params: Any, *, as_tensor: bool = False, late: bool = False) -> None:
        rules = {"lr": 1e-2, "betas": (0.9, 0.999), "is_begun": False}
        super().__init__(params, rules)
        for group in () if late else self.param_groups:
            group["k"] = torch.zeros((), dtype=torch.int64) if as_tensor else 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            group["is_begun"] = True
            group["k"] = group.get("k", 0)
            group["k"] += 1
            for parameter in group["params"]:
                self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, (first, second), k = self.state[parameter], group["betas"], int(group["k"])
        mean, square = (state.setdefault(key, torch.zeros_like(parameter)) for key in ("exp_avg", "exp_avg_sq"))
        assert parameter.grad is not None
        mean.lerp_(parameter.grad, 1 - first)
        square.lerp_(parameter.grad.square(), 1 - second)
        root = (square / (1 - second**k)).sqrt() + 1e-8
        parameter.sub_(group["lr"] * mean / (1 - first**k) / root)


def counting_in_two_groups(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return Counting([{"params": params[:2]}, {"params": params[2:]}])


COUNTING: dict[str, Factory] = {
    "number": lambda params: Counting(params),
    "tensor": lambda params: Counting(params, as_tensor=True),
    "number that comes with the first step": lambda params: Counting(params, late=True),
}


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("factory", COUNTING.values(), ids=COUNTING)
def test_what_an_optimizer_counts_in_its_groups_goes_on_in_a_second_engine(factory: Factory, zero: int) -> None:
    check_two_engines(factory, zero)


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_every_group_goes_on_counting_where_it_was(zero: int) -> None:
    check_two_engines(counting_in_two_groups, zero)


def test_what_was_counted_comes_back_with_the_checkpoint_and_what_the_task_says_now_stands(tmp_path: Path) -> None:
    first = opened(make_model(), COUNTING["tensor"], EngineOptions(4, 2))
    run(first, batches(3))
    state = taken(first)
    first.close()
    assert state.optimizer.scalars == [{"group:k": (3, True), "group:is_begun": (True, False)}]
    save_checkpoint(tmp_path, state, 1)
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None

    def other_betas(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        made = Counting(params, as_tensor=True)
        made.param_groups[0]["betas"], made.param_groups[0]["weight_decay"] = (0.5, 0.5), 0.25
        return made

    second = opened(make_model(), other_betas, EngineOptions(4, 2), loaded[0])
    group = second.optimizer.param_groups[0]
    assert (int(group["k"]), group["k"].dtype, group["is_begun"]) == (3, torch.int64, True)
    assert (group["betas"], group["weight_decay"]) == ((0.5, 0.5), 0.25)
    second.close()


def test_a_state_that_was_reset_counts_from_the_start() -> None:
    first = opened(make_model(), COUNTING["number"], EngineOptions(4, 2))
    run(first, batches(2))
    state = taken(first)
    first.close()
    state.optimizer = OptimizerState()
    second = opened(make_model(), COUNTING["number"], EngineOptions(4, 2), state)
    run(second, batches(1))
    assert second.optimizer.param_groups[0]["k"] == 1
    second.close()


def test_the_trial_of_an_optimizer_leaves_what_it_counts() -> None:
    optimizer = Counting([nn.Parameter(torch.ones(3, 2))], as_tensor=True)
    check_optimizer(optimizer, in_parts=True)
    assert int(optimizer.param_groups[0]["k"]) == 0


@pytest.mark.parametrize(
    ("factory", "added"),
    [(counting_in_two_groups, {}), (COUNTING["number"], {"zero_optimization": {"sub_group_size": 100}})],
    ids=["two groups", "parts of a group"],
)
def test_stage_3_refuses_one_that_would_count_more_than_its_steps(factory: Factory, added: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match="Counting counts k in its parameter groups, and stage 3 calls it several times"
    ) as caught:
        opened(make_model(), factory, EngineOptions(4, zero_stage=3, deepspeed=added))
    assert "train with --zero 2" in str(caught.value)


def test_what_groups_keep_and_is_no_number_is_refused_when_it_changes() -> None:
    class Remembering(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            super().step()
            for group in self.param_groups:
                group["seen"].append(len(group["seen"]))

    optimizer = Remembering([nn.Parameter(torch.ones(3, 2))])
    optimizer.param_groups[0]["seen"] = []
    with pytest.raises(UserError, match="Remembering changes seen in its parameter groups, which is no number"):
        check_optimizer(optimizer, in_parts=False)
    assert optimizer.param_groups[0]["seen"] == []
