"""What cannot be recorded is refused with the module and the reason, or noted where the rest is sound."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gapfx.capture import capture
from gapfx.errors import CaptureError, TaskError


def scripted(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(module)


class Argmax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(-1)


def x() -> Tensor:
    return torch.randn(2, 4)


LINEAR, STACK = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(3, 3)))
REFUSED: list[tuple[nn.Module, Callable[[nn.Module], object], str]] = [
    (LINEAR, lambda m: m.forward(x()), "the loss never calls the model itself\n"),
    (STACK, lambda m: m.get_submodule("0")(x()), "never calls the model itself, only its module '0'"),
    (STACK, lambda m: m(x()), "where: 1.0 (Linear), test_capture_refusals.py:"),
    (LINEAR, lambda m: m(x()).absent, "the loss fails after the forward: AttributeError"),
    (LINEAR, lambda m: 1 / 0, "the loss fails before it calls the model: ZeroDivisionError"),
    (Argmax(), lambda m: m(x()), "the model returns no floating point tensor (Tensor)"),
    (nn.Linear(4, 4, device="meta"), lambda m: m(x()), "weight is on the meta device and has no values"),
    (nn.DataParallel(LINEAR), lambda m: m(x()), "wrapped in DataParallel"),
]


@pytest.mark.parametrize(("model", "run", "message"), REFUSED)
def test_refusals_name_the_place_and_the_reason(
    model: nn.Module, run: Callable[[nn.Module], object], message: str
) -> None:
    with pytest.raises(CaptureError) as refused:
        capture(model, run)
    assert message in str(refused.value)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_parameters_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"the parameter 0\.weight has no shape yet"):
        capture(nn.Sequential(nn.LazyLinear(4)), lambda m: m(x()))


def test_a_script_module_is_refused_as_the_root_and_noted_inside() -> None:
    with pytest.raises(CaptureError, match="the model is a ScriptModule"):
        capture(scripted(nn.Linear(4, 4)), lambda m: m(x()))
    recorded = capture(nn.Sequential(nn.Linear(4, 4), scripted(nn.Linear(4, 4))), lambda m: m(x()))
    assert recorded.notes == ("1: a ScriptModule uses 1.weight as an operand of addmm, seen by the ops below it",)
    assert recorded.parameters["1.weight"].role == "gemm"
    assert recorded.parameters["0.weight"].role == "gemm"


def test_paths_that_depend_on_values_are_noted_with_their_module() -> None:
    class Router(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum() > 0 else x[x > 0]

    recorded = capture(nn.Sequential(Router()), lambda m: m(torch.ones(2, 4)))
    assert recorded.notes == ("0: the path depends on values (bool): the graph is one path of several",)


def test_modules_and_tensors_that_the_model_does_not_own_are_noted() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.table = [nn.Linear(4, 4)], torch.ones(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.hidden[0](x) * self.table

    notes = capture(Hidden(), lambda m: m(x())).notes
    assert notes[0] == "a module of class Linear is called but not registered in the model: its weights stay dense"
    assert notes[1] == "the root: constants of the graph: 3 tensors that are no input, parameter or buffer"


def test_a_forward_that_writes_into_a_parameter_is_noted() -> None:
    class Clipped(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            with torch.no_grad():
                self.weight.clamp_(-1, 1)
            return super().forward(input)

    recorded = capture(Clipped(4, 4), lambda m: m(x()))
    assert "its forward writes into the parameter weight in place" in recorded.notes[0]


def test_errors_that_already_name_their_cause_pass_through() -> None:
    def run(model: nn.Module) -> None:
        raise TaskError("no batch")

    with pytest.raises(TaskError, match="no batch"):
        capture(LINEAR, run)
