"""The quality of groups, against numbers counted by hand."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gapfx.compiler import Unit
from gapfx.passes import AllocateSparsity, Partition
from gapfx.plan import Group, Plan, Weight
from gapfx.quality import Quality, format_quality, measure
from tests.models import LanguageModel, captured, resnet50, resnet_input, tokens


def unit_of(model: nn.Module, *inputs: Tensor, **options: Any) -> Unit:
    unit = Unit(captured(model, *inputs))
    unit.choose(Partition(**options))
    unit.choose(AllocateSparsity(0.5))
    return unit


def quality_of(unit: Unit) -> Quality:
    return measure(unit, unit.latest(AllocateSparsity))


def chain(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(widths)))


def test_sizes_balance_and_peak_of_a_chain_of_layers() -> None:
    # 2 x 4, 4 x 8, 8 x 1: 8, 32 and 8 weights; the middle one dense: 32 + 4 + 4 of 48.
    quality = quality_of(unit_of(chain(2, 4, 8, 1), torch.randn(3, 2), groups=3))
    assert quality.sizes == (8, 32, 8)
    assert quality.balance == 2
    assert quality.peak == 40 / 48
    assert (quality.cut, quality.num_edges, quality.num_blocks) == (2, 2, 0)


def test_residual_sums_go_with_the_layer_before_them() -> None:
    # The second block reads the stream twice: in its first layer and in its sum.
    quality = quality_of(unit_of(LanguageModel(is_tied=False), tokens(), groups=2))
    assert (quality.cut, quality.split, quality.num_blocks) == (2, (), 2)


def test_groups_of_whole_blocks_split_none_and_random_ones_do() -> None:
    inputs = resnet_input()
    assert quality_of(unit_of(resnet50(), inputs, groups=4)).split == ()
    split = quality_of(unit_of(resnet50(), inputs, groups=4, strategy="random")).split
    assert "layer1.0" in split


def test_a_plan_from_elsewhere_is_measured_too() -> None:
    unit = unit_of(chain(2, 4, 4), torch.randn(3, 2))
    plan = Plan((Group("all", (Weight("0.weight", (4, 2), 0.5),)),))
    quality = measure(unit, plan)
    assert (quality.sizes, quality.peak, quality.cut) == ((8,), 1.0, 0)


def test_the_text_names_blocks_that_are_split() -> None:
    text = format_quality(Quality((8, 32), 0.85, 2, 9, ("a.0", "a.1", "a.2", "a.3"), 4))
    assert text == (
        "balance 1.60 (largest group over mean), at most 85.0% of planned weights live\n"
        "cut width 2 of 9 edges between layers, blocks split 4 of 4 (a.0, a.1, a.2, ...)\n"
    )
