"""Masks folded into the parameters."""

from __future__ import annotations

import pytest
import torch

from gapfx.compiler import Pipeline, Unit, parse_pipeline, realise
from gapfx.masks import pack, stored_parameter, write_bits
from gapfx.passes import InsertMasks
from tests.masking import assert_same, masked, planned, run
from tests.models import CASES, captured, mlp


@pytest.mark.parametrize("name", CASES)
def test_folding_leaves_the_zeros_in_the_parameters_and_the_classes_as_they_were(name: str) -> None:
    unit, plain, inputs = masked(name)
    model = unit.capture.model
    for weight in planned(unit):
        mask = torch.rand(weight.shape) < 0.5
        for fqn in (weight.fqn, *weight.aliases):
            write_bits(model, fqn, pack(mask))
        stored_parameter(plain, weight.fqn).data.masked_fill_(~mask, 0)
    expected, nodes = run(model, inputs)[0], unit.num_nodes()
    parse_pipeline("fold-masks").run(unit)
    realise(unit)
    places = sum(1 + len(weight.aliases) for weight in planned(unit))
    assert nodes - unit.num_nodes() == 2 * places
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in plain.named_buffers()]
    assert torch.equal(run(model, inputs)[0], expected)
    assert_same(dict(model.named_parameters()), dict(plain.named_parameters()))


def test_folding_without_masks_changes_nothing() -> None:
    unit = Unit(captured(mlp(), torch.randn(2, 6)))
    text = unit.text()
    parse_pipeline("fold-masks,fold-masks").run(unit)
    assert unit.text() == text


def test_masks_can_be_inserted_again_after_folding() -> None:
    unit, _, inputs = masked("lstm")
    expected = run(unit.capture.model, inputs)[0]
    parse_pipeline("fold-masks").run(unit)
    realise(unit)
    Pipeline((InsertMasks(),)).run(unit)
    realise(unit)
    assert torch.equal(run(unit.capture.model, inputs)[0], expected)
