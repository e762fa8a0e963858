"""Which optimizers an engine takes, and what they are shown of the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gapfx.errors import UserError
from gapfx.runtime.engine import EngineOptions
from gapfx.runtime.optimizers import check_optimizer, make_optimizer
from tests.runtime.test_engine import (
    batches,
    check_two_engines,
    largest_difference,
    make_model,
    opened,
    plain_weights,
    run,
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
