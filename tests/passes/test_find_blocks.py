"""Repeated blocks and what is left over."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gapfx.compiler import Unit
from gapfx.passes import FindBlocks, FindWeights
from tests.models import (
    Attention,
    Experts,
    LanguageModel,
    Mlp,
    Tagger,
    captured,
    mlp,
    resnet50,
    resnet_input,
    tokens,
    transformer,
    transformer_inputs,
)

WIDE = [f"layer{stage}.{block}" for stage, depth in enumerate((3, 4, 6, 3), 1) for block in range(depth)]


class Stage(nn.Module):
    """Blocks with a transition in front, as in ConvNeXt or Swin."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.transition = nn.Linear(8, 8)
        self.blocks = nn.Sequential(*(Mlp() for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.transition(x))


class Stack(nn.Module):
    """Half of an encoder-decoder whose halves have one class."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(Mlp() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = x + block(x)
        return x


class Pair(nn.Module):
    """Two equal children that are attributes of the root."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.one, self.two = make(), make()

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


def found(model: nn.Module, *inputs: Tensor) -> tuple[list[str], list[str]]:
    """Names of the repeated blocks, and of the others."""
    unit = Unit(captured(model, *inputs))
    blocks = unit.fact(FindBlocks())
    weights = [fqn for block in blocks for fqn in block.weights]
    assert sorted(weights) == sorted(item.fqn for item in unit.fact(FindWeights()).prunable)
    return [b.name for b in blocks if b.is_repeated], [b.name for b in blocks if not b.is_repeated]


def test_layers_of_a_transformer_come_in_execution_order() -> None:
    sides = [f"{side}.layers.{index}" for side in ("encoder", "decoder") for index in range(6)]
    assert found(transformer(), *transformer_inputs()) == (sides, [])


def test_bottlenecks_are_blocks_with_the_first_of_each_stage() -> None:
    unit = Unit(captured(resnet50(), resnet_input()))
    blocks = unit.fact(FindBlocks())
    assert [block.name for block in blocks] == ["conv1", *WIDE, "fc"]
    assert [block.is_repeated for block in blocks] == [False, *[True] * 16, False]
    assert list(dict.fromkeys(block.stage for block in blocks)) == ["", "layer1", "layer2", "layer3", "layer4"]
    assert blocks[1].weights[-1] in ("layer1.0.conv3.weight", "layer1.0.downsample.0.weight")
    assert len(blocks[1].weights) == 4


def test_stages_in_a_container_are_not_blocks_but_what_they_repeat_is() -> None:
    model = nn.Sequential(Stage(2), Stage(3))
    blocks = ["0.blocks.0", "0.blocks.1", "1.blocks.0", "1.blocks.1", "1.blocks.2"]
    assert found(model, torch.randn(2, 8)) == (blocks, ["0.transition", "1.transition"])


def test_a_stage_of_one_block_has_that_block() -> None:
    assert found(nn.Sequential(Stage(1), Stage(3)), torch.randn(2, 8))[0][0] == "0.blocks.0"


def test_two_stacks_of_one_class_are_not_blocks() -> None:
    blocks = ["one.block.0", "one.block.1", "two.block.0", "two.block.1"]
    assert found(Pair(lambda: Stack(2)), torch.randn(2, 8)) == (blocks, [])


def test_layers_of_experts_are_blocks_and_experts_are_not() -> None:
    assert found(nn.Sequential(Experts(), Experts()), torch.randn(10, 8)) == (["0", "1"], [])


def test_equal_children_of_the_root_are_blocks_when_nothing_else_repeats() -> None:
    assert found(Pair(Mlp), torch.randn(2, 8)) == (["one", "two"], [])


def test_without_repeats_every_layer_is_a_block_of_its_own() -> None:
    assert found(mlp(), torch.randn(2, 6)) == ([], ["0", "2", "4"])


def test_layers_of_a_recurrent_network_are_blocks_with_both_directions() -> None:
    assert found(Tagger(), tokens()) == (["lstm.0", "lstm.1"], ["out"])
    unit = Unit(captured(nn.GRU(4, 4, 2, bidirectional=True), torch.randn(3, 2, 4)))
    first, second = unit.fact(FindBlocks())
    assert (first.name, second.name) == ("layer 0", "layer 1")
    assert [fqn for fqn in first.weights if fqn.endswith("_reverse")] == [
        "weight_ih_l0_reverse",
        "weight_hh_l0_reverse",
    ]
    assert found(nn.LSTM(4, 4), torch.randn(3, 2, 4)) == ([], [""])


class RawWeights(nn.Module):
    """Pairs of weights in lists, used in turn by one forward."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(6, 8))
        self.up = nn.ParameterList(torch.randn(8, 16) for _ in range(depth))
        self.down = nn.ParameterList(torch.randn(16, 8) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.first
        for up, down in zip(self.up, self.down, strict=True):
            x = x + (x @ up).relu() @ down
        return x


class Numbered(nn.Module):
    """Layers that are attributes with numbers in their names."""

    def __init__(self) -> None:
        super().__init__()
        for number in range(3):
            self.add_module(f"attention{number}", nn.MultiheadAttention(8, 2, batch_first=True))
            self.add_module(f"linear{number}", nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        for number in range(3):
            x = self.get_submodule(f"attention{number}")(x, x, x)[0]
            x = self.get_submodule(f"linear{number}")(x)
        return x


def test_what_repeats_in_the_order_of_execution_is_a_block_where_no_name_tells() -> None:
    assert found(RawWeights(3), torch.randn(2, 6)) == (["up.0", "up.1", "up.2"], [""])
    unit = Unit(captured(RawWeights(2), torch.randn(2, 6)))
    assert [block.weights for block in unit.fact(FindBlocks())] == [("first",), ("up.0", "down.0"), ("up.1", "down.1")]


def test_repeats_without_names_keep_attentions_whole() -> None:
    blocks = Unit(captured(Numbered(), torch.randn(2, 5, 8))).fact(FindBlocks())
    assert [len(block.weights) for block in blocks] == [3, 3, 3]
    assert [block.name for block in blocks] == ["attention0", "attention1", "attention2"]


def test_an_attention_outside_of_every_block_stays_together() -> None:
    blocks, rest = found(nn.Sequential(*(nn.Linear(8, 8) for _ in range(2))), torch.randn(2, 8))
    assert (blocks, rest) == ([], ["0", "1"])
    assert found(Attention(), torch.randn(2, 5, 8), torch.randn(2, 4, 6))[0] == ["attention", "cross"]


def test_dense_weights_are_in_no_block() -> None:
    unit = Unit(captured(LanguageModel(is_tied=False), tokens()))
    unit.choose(FindWeights(dense=("blocks.0",)))
    assert [block.name for block in unit.latest(FindBlocks)] == ["blocks.1"]
