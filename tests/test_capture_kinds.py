"""Roles of the parameters of many kinds of layers: what each weight is, found by dataflow alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gapfx.capture import Capture, capture
from tests.kinds import KINDS, Kind
from tests.models import Mlp


def recorded(kind: Kind) -> Capture:
    inputs = kind.inputs()
    return capture(kind.build(), lambda model: model(*inputs))


def matrices(found: Capture) -> dict[str, str]:
    return {fqn: item.role for fqn, item in found.parameters.items() if len(item.shape) > 1}


pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@pytest.mark.parametrize("name", KINDS)
def test_roles_of_a_kind_of_layer(name: str) -> None:
    expected = dict(pair.split("=") for pair in KINDS[name].roles.split())
    assert matrices(recorded(KINDS[name])) == expected


@pytest.mark.parametrize("name", KINDS)
def test_everything_that_is_no_weight_says_why(name: str) -> None:
    found = recorded(KINDS[name])
    others = {fqn for fqn, role in matrices(found).items() if role == "other"}
    assert all(any(use.reason for use in found.uses if use.fqn == fqn) for fqn in others)


class Routed(nn.Module):
    """Experts in a loop that leaves out those without tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(8, 3), nn.ModuleList(Mlp() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        choice, out = self.router(x).argmax(-1), torch.zeros_like(x)
        for index in choice.unique().tolist():
            out[choice == index] = self.experts[index](x[choice == index])
        return x + out


def test_experts_without_tokens_are_taken_as_their_siblings_are() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Routed() for _ in range(2))
            self.spare, self.other = Mlp(), nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 4)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return self.other[0](x)

    torch.manual_seed(0)
    model, token = Layers(), torch.randn(1, 8)
    found = capture(model, lambda module: module(token))
    roles = matrices(found)
    assert {role for fqn, role in roles.items() if fqn.startswith("layers")} == {"gemm"}
    # neither a sibling of another shape nor a module that has no siblings
    assert {fqn for fqn, role in roles.items() if role == "unused"} == {
        "spare.up.weight",
        "spare.down.weight",
        "other.1.weight",
    }
    assumed = [use for use in found.uses if use.is_assumed]
    assert {use.user for use in assumed} <= {
        f"layers.{i}.experts.{j}.{part}" for i in range(2) for j in range(3) for part in ("up", "down")
    }
    assert any(
        note.startswith("the model: this batch did not come to 8 weights (layers.0.experts.") for note in found.notes
    )


def test_an_unreached_weight_stands_beside_the_sibling_before_it() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[3](self.layers[1](x))

    found = capture(Skips(), lambda module: module(torch.randn(2, 4)))
    order = [use.fqn for use in found.uses if use.role == "gemm"]
    assert order == [f"layers.{index}.weight" for index in (1, 0, 2, 3)]


def test_unreached_entries_of_a_parameter_list_are_taken() -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernels = nn.ParameterList(torch.randn(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.kernels[1]

    found = capture(Pool(), lambda module: module(torch.randn(2, 4)))
    assert set(matrices(found).values()) == {"gemm"}
