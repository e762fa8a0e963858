"""Lowered graphs with weights in both forms: to the bit what the masks give."""

from __future__ import annotations

import copy
import gc
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gapfx.compiler import Unit, realise
from gapfx.masks import pack, stored_parameter, write_bits
from gapfx.ops.recompute import without_dense
from gapfx.passes import LowerCompact
from gapfx.text import format_graph
from tests.masking import EVERYTHING, planned, run
from tests.models import CASES, captured

NAMES = tuple(CASES)


def lowered(name: str) -> tuple[Unit, nn.Module, nn.Module, tuple[Any, ...]]:
    """A unit whose model is lowered, with random masks, and the same model with mask ops."""
    torch.manual_seed(0)
    model, inputs = CASES[name][0](), CASES[name][1]()
    unit = EVERYTHING.run(Unit(captured(model, *inputs)))
    realise(unit)
    for weight in planned(unit):
        mask = torch.rand(weight.shape) < 0.4
        mask.view(-1)[0] = True
        for fqn in (weight.fqn, *weight.aliases):
            write_bits(model, fqn, pack(mask))
        with torch.no_grad():
            stored_parameter(model, weight.fqn).masked_fill_(~mask, 0)
    masked = copy.deepcopy(model)
    assert LowerCompact().apply(unit)
    for owner in unit.owners.values():
        owner.graph.graph.lint()
    realise(unit)
    return unit, model, masked, inputs


def make_compact(unit: Unit, model: nn.Module) -> dict[str, Tensor]:
    """Hold the live values alone; FQN -> mask."""
    masks: dict[str, Tensor] = {}
    for weight in planned(unit):
        parameter = stored_parameter(model, weight.fqn)
        masks[weight.fqn] = parameter.detach() != 0
        values = nn.Parameter(parameter.detach()[masks[weight.fqn]].view(-1, 1))
        for fqn in (weight.fqn, *weight.aliases):
            path, _, held = fqn.rpartition(".")
            vars(model.get_submodule(path))["_parameters"][held] = values
    return masks


def stored_gradients(model: nn.Module, names: dict[str, Any]) -> dict[str, Tensor | None]:
    return {fqn: stored_parameter(model, fqn).grad for fqn in names}


def assert_bitwise(name: str, ours: Tensor, theirs: Tensor) -> None:
    """Equal; of an LSTM up to rounding, since MKL's sums over small odd matrices depend on where they lie in memory."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 if name == "lstm" else 0)


@pytest.mark.parametrize("name", NAMES)
def test_weights_in_the_dense_shape_are_masked_as_before(name: str) -> None:
    _, model, masked, inputs = lowered(name)
    ours, theirs = run(model, inputs), run(masked, inputs)
    assert_bitwise(name, ours[0], theirs[0])
    for fqn, gradient in ours[1].items():
        other = theirs[1][fqn]
        assert (gradient is None) == (other is None), fqn
        if gradient is not None and other is not None:
            assert_bitwise(name, gradient, other)


@pytest.mark.parametrize("name", NAMES)
def test_live_values_alone_give_the_same_to_the_bit(name: str) -> None:
    unit, model, masked, inputs = lowered(name)
    names = dict(model.named_parameters())
    theirs, _ = run(masked, inputs)
    wanted = stored_gradients(masked, names)
    masks = make_compact(unit, model)
    ours, _ = run(model, inputs)
    assert_bitwise(name, ours, theirs)
    for fqn, gradient in stored_gradients(model, names).items():
        full = wanted[fqn]
        if full is None or gradient is None:
            assert full is gradient
        else:
            assert_bitwise(name, gradient, full[masks[fqn]].view(-1, 1) if fqn in masks else full)


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_gives_the_same(name: str) -> None:
    unit, model, masked, inputs = lowered(name)
    make_compact(unit, model)
    with torch.no_grad():
        assert_bitwise(name, model.eval()(*inputs), masked.eval()(*inputs))


@pytest.mark.parametrize("name", NAMES)
def test_no_dense_weight_is_kept_for_the_backward(name: str) -> None:
    unit, model, masked, inputs = lowered(name)
    expected, _ = run(masked, inputs)
    wanted = stored_gradients(masked, dict(masked.named_parameters()))
    masks = make_compact(unit, model)
    torch.manual_seed(1)
    with without_dense():
        output = model(*inputs)
    dense = [item for item in gc.get_objects() if type(item) is torch.UntypedStorage and hasattr(item, "gapfx_recipe")]
    assert dense == []
    assert_bitwise(name, output.detach(), expected)
    output.square().sum().backward()
    for fqn, gradient in stored_gradients(model, masks).items():
        full = wanted[fqn]
        assert (gradient is None) == (full is None), fqn
        if gradient is not None and full is not None:
            assert_bitwise(name, gradient, full[masks[fqn]].view(-1, 1))


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickled_models_are_compact_too(name: str) -> None:
    unit, model, _, inputs = lowered(name)
    make_compact(unit, model)
    model.eval()
    with torch.no_grad():
        for twin in (copy.deepcopy(model), torch.load(_saved(model), weights_only=False)):
            assert_bitwise(name, twin(*inputs), model(*inputs))


def _saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


class Kinds(nn.Module):
    """One layer of each kind that is lowered, or not."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6, padding_idx=1)
        self.same, self.uneven = nn.Conv1d(6, 6, 3, padding="same"), nn.Conv1d(6, 6, 4, padding="same")
        self.circular = nn.Conv1d(6, 6, 3, padding=1, padding_mode="circular")
        self.linear, self.twice = nn.Linear(6, 6), nn.Bilinear(6, 6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.table(x).transpose(1, 2)
        y = self.linear(self.circular(self.uneven(self.same(y))).transpose(1, 2))
        return self.twice(y, y)


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths:UserWarning")
def test_each_kind_of_layer_gets_its_op() -> None:
    unit = EVERYTHING.run(Unit(captured(Kinds(), torch.arange(8).view(2, 4))))
    assert LowerCompact().apply(unit)
    found = {
        fqn: [str(getattr(n.target, "__name__", n.target)) for n in owner.graph.graph.nodes if n.op == "call_function"]
        for fqn, owner in unit.owners.items()
    }
    assert found["table"] == ["embedding.default"]
    assert found["same"] == ["convolution"]
    assert found["uneven"] == ["dense_again", "conv1d"]
    assert found["circular"] == ["pad", "convolution"]
    assert found["linear"] == ["linear"]
    assert found["twice"] == ["dense_again", "bilinear"]
    assert not LowerCompact().apply(unit)
    assert "gapfx.mask" not in "".join(format_graph(owner.graph) for owner in unit.owners.values())
