"""`lower-inference`: which ops take the kernels of inference, and what it says of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gapfx.compiler import Unit, realise
from gapfx.passes import LowerCompact
from gapfx.passes.lower_inference import LowerInference, served
from gapfx.text import format_graph
from tests.masking import EVERYTHING
from tests.models import CASES, captured

NEW = {"fixed_linear", "sparse_convolution"}


class Layers(nn.Module):
    """Layers that kernels take, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.same = nn.Embedding(9, 6), nn.Conv1d(6, 6, 3, padding="same")
        self.circular = nn.Conv1d(6, 6, 3, padding=1, padding_mode="circular")
        self.linear, self.both = nn.Linear(6, 6), nn.Bilinear(6, 6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.circular(self.same(self.table(x).transpose(1, 2))).transpose(1, 2)
        y = self.linear(y)
        return self.both(y, y)


def compact(model: nn.Module, *inputs: Any) -> Unit:
    unit = EVERYTHING.run(Unit(captured(model, *inputs)))
    LowerCompact().apply(unit)
    return unit


def calls(unit: Unit) -> dict[str, list[str]]:
    """Names of the functions in the graph of each owner."""
    return {
        fqn: [str(getattr(n.target, "__name__", n.target)) for n in owner.graph.graph.nodes if n.op == "call_function"]
        for fqn, owner in unit.owners.items()
    }


def test_each_linear_layer_and_convolution_is_edited_once_and_no_other_op() -> None:
    unit = compact(Layers(), torch.arange(8).view(2, 4))
    before = calls(unit)
    assert LowerInference().apply(unit)
    after = calls(unit)
    edits = [(old, new) for fqn in before for old, new in zip(before[fqn], after[fqn], strict=True) if old != new]
    assert sorted(edits) == [("convolution", "sparse_convolution")] * 2 + [("linear", "fixed_linear")]
    assert after["table"] == ["embedding.default"]
    assert after["both"] == ["dense_again", "bilinear"]
    assert unit.refusals == []


@pytest.mark.parametrize("name", tuple(CASES))
def test_a_second_run_changes_nothing_and_graphs_stay_valid(name: str) -> None:
    unit = compact(CASES[name][0](), *CASES[name][1]())
    changed = LowerInference().apply(unit)
    texts = [format_graph(owner.graph) for owner in unit.owners.values()]
    assert changed == any(NEW & {*names} for names in calls(unit).values())
    assert not LowerInference().apply(unit)
    assert [format_graph(owner.graph) for owner in unit.owners.values()] == texts
    for owner in unit.owners.values():
        owner.graph.graph.lint()


@pytest.mark.parametrize("name", ["mlp", "cnn", "tied"])
def test_masks_of_ones_give_the_outputs_of_the_plain_model(name: str) -> None:
    model, inputs = CASES[name][0]().eval(), CASES[name][1]()
    wanted = model(*inputs)
    unit = compact(model.train(), *inputs)
    LowerInference().apply(unit)
    realise(unit)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(*inputs), wanted.detach(), rtol=0, atol=1e-6)


def test_the_graph_of_a_layer_for_inference(golden: Callable[[str, str], None]) -> None:
    unit = compact(Layers(), torch.arange(8).view(2, 4))
    LowerInference().apply(unit)
    golden("lower_inference", "\n".join(f"{fqn}:\n{format_graph(owner.graph)}" for fqn, owner in unit.owners.items()))


def test_a_convolution_without_a_kernel_stays_and_is_named_with_the_reason() -> None:
    unit = compact(nn.Sequential(nn.Conv1d(6, 6, 3).double()), torch.randn(2, 6, 5, dtype=torch.float64))
    assert not LowerInference().apply(unit)
    assert calls(unit) == {"0": ["convolution"]}
    [(fqn, reason)] = unit.refusals
    assert fqn == "0"
    assert "float64" in reason


def test_the_uses_of_each_weight_are_named() -> None:
    unit = compact(Layers(), torch.arange(8).view(2, 4))
    uses = served(unit)
    assert {uses[f"{name}.weight"] for name in ("same", "circular", "linear", "table", "both")} == {"dense"}
    LowerInference().apply(unit)
    uses = served(unit)
    assert uses["linear.weight"] == "linear"
    assert uses["same.weight"] == uses["circular.weight"] == "convolution"
    assert uses["table.weight"] == uses["both.weight"] == "dense"


def test_a_layer_that_is_masked_in_place_is_left_alone() -> None:
    scripted: Any = torch.jit.script(nn.Linear(6, 6))  # pyright: ignore[reportPrivateImportUsage]
    unit = compact(nn.Sequential(scripted), torch.randn(2, 6))
    assert not LowerInference().apply(unit)
    assert set(served(unit).values()) <= {"dense"}
