"""Groups of weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gapfx.compiler import Unit
from gapfx.errors import UserError
from gapfx.passes import FindWeights, Partition
from tests.models import (
    LanguageModel,
    captured,
    mlp,
    resnet50,
    resnet_input,
    tokens,
    transformer,
    transformer_inputs,
)


@pytest.fixture(scope="module")
def seq2seq() -> Unit:
    """The paper's Transformer, narrow."""
    return Unit(captured(transformer(), *transformer_inputs()))


@pytest.fixture(scope="module")
def resnet() -> Unit:
    return Unit(captured(resnet50(), resnet_input()))


def groups(unit: Unit, **options: Any) -> dict[str, tuple[str, ...]]:
    found = dict(unit.fact(Partition(**options)))
    weights = [fqn for fqns in found.values() for fqn in fqns]
    assert sorted(weights) == sorted(item.fqn for item in unit.latest(FindWeights).prunable)
    return found


def layers(fqns: tuple[str, ...], depth: int = 3) -> list[str]:
    return list(dict.fromkeys(".".join(fqn.split(".")[:depth]) for fqn in fqns))


def sides(encoder: range, decoder: range) -> list[str]:
    return [*(f"encoder.layers.{i}" for i in encoder), *(f"decoder.layers.{i}" for i in decoder)]


EMPTY = range(0)
# The splits of the paper's profiles for Transformer-big.
PROFILES = [
    ([(range(6), EMPTY), (EMPTY, range(6))], ["encoder.layers.0-5", "decoder.layers.0-5"]),
    (
        [(range(4), EMPTY), (range(4, 6), range(2)), (EMPTY, range(2, 6))],
        ["encoder.layers.0-3", "encoder.layers.4-5+decoder.layers.0-1", "decoder.layers.2-5"],
    ),
    (
        [
            *((range(2 * i, 2 * i + 2), EMPTY) for i in range(3)),
            *((EMPTY, range(2 * i, 2 * i + 2)) for i in range(3)),
        ],
        [f"{side}.layers.{2 * i}-{2 * i + 1}" for side in ("encoder", "decoder") for i in range(3)],
    ),
]


@pytest.mark.parametrize(("profile", "names"), PROFILES)
def test_blocks_gives_the_splits_of_the_paper(
    seq2seq: Unit, profile: list[tuple[range, range]], names: list[str]
) -> None:
    found = groups(seq2seq, groups=len(profile))
    assert [layers(fqns) for fqns in found.values()] == [sides(*part) for part in profile]
    assert list(found) == names


def test_stages_gives_the_stages_of_a_resnet_with_stem_and_head_at_the_ends(resnet: Unit) -> None:
    found = groups(resnet, strategy="stages")
    assert list(found) == ["layer1", "layer2", "layer3", "layer4"]
    assert [layers(fqns, 1) for fqns in found.values()] == [
        ["conv1", "layer1"],
        ["layer2"],
        ["layer3"],
        ["layer4", "fc"],
    ]


def test_blocks_can_be_single_bottlenecks(resnet: Unit) -> None:
    found = groups(resnet, groups=16)
    names = [f"layer{stage}.{block}" for stage, depth in enumerate((3, 4, 6, 3), 1) for block in range(depth)]
    assert list(found) == names
    assert layers(found["layer1.0"], 2) == ["conv1.weight", "layer1.0"]
    assert layers(found["layer4.2"], 2) == ["layer4.2", "fc.weight"]


def test_fewer_groups_than_stages_merge_neighbours(resnet: Unit) -> None:
    assert list(groups(resnet, strategy="stages", groups=2)) == ["layer1-3", "layer4"]


def test_params_makes_the_largest_group_as_small_as_possible(seq2seq: Unit) -> None:
    found = groups(seq2seq, strategy="params", groups=4)
    shapes = {item.fqn: item.numel for item in seq2seq.latest(FindWeights).prunable}
    sizes = [sum(shapes[fqn] for fqn in fqns) for fqns in found.values()]
    # An encoder layer has 2 units of 256 weights, a decoder layer 3: 30 units in 4 chains need 9 in one of them.
    assert max(sizes) == 9 * 256
    assert next(iter(found)).startswith("encoder.layers.0-")


def test_random_is_repeatable_covers_all_and_keeps_layers_whole(seq2seq: Unit) -> None:
    first, again, other = (groups(seq2seq, strategy="random", seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert list(first) == ["random-0", "random-1", "random-2", "random-3"]
    for fqns in first.values():
        for fqn in fqns:
            if fqn.endswith("self_attn.in_proj_weight"):
                assert fqn.replace("in_proj_weight", "out_proj.weight") in fqns


def test_by_hand_makes_one_group_for_each_glob(resnet: Unit) -> None:
    globs = ("conv1|layer1|layer2", "layer3", "layer4|fc")
    found = groups(resnet, strategy="by-hand", globs=globs)
    assert tuple(found) == globs
    assert layers(found["layer4|fc"], 1) == ["layer4", "fc"]


@pytest.mark.parametrize(
    ("globs", "message"),
    [
        (("conv1", "layer*"), "fc.weight is in no group\n  where: matched by no glob"),
        (
            ("*conv*|fc", "layer*"),
            "layer1.0.conv1.weight is in two groups\n  where: matched by '*conv*|fc' and 'layer*'",
        ),
        (("layer9", "layer*"), "the glob 'layer9' matches no weight\n  where: option globs of partition"),
    ],
)
def test_globs_that_do_not_split_the_weights_are_refused(resnet: Unit, globs: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as caught:
        resnet.fact(Partition(strategy="by-hand", globs=globs))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 13}, "13 groups need 13 blocks, the model has 12 blocks"),
        ({"groups": 13, "strategy": "params"}, "13 groups need 13 blocks, the model has 12 blocks"),
        ({"groups": 3, "strategy": "stages"}, "3 groups need 3 stages, the model has 2 stages"),
        ({"groups": 43, "strategy": "random"}, "43 groups need 43 layers, the model has 42 layers"),
    ],
)
def test_more_groups_than_blocks_says_how_many_there_are(seq2seq: Unit, options: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        seq2seq.fact(Partition(**options))
    assert message in str(caught.value)


@pytest.mark.parametrize("options", [{"strategy": "by-hand"}, {"globs": ("a",)}])
def test_globs_and_by_hand_go_together(options: Any) -> None:
    with pytest.raises(UserError, match="globs and strategy=by-hand go together"):
        Partition(**options)


def test_layers_count_as_blocks_where_nothing_repeats() -> None:
    unit = Unit(captured(mlp(), torch.randn(2, 6)))
    assert groups(unit, groups=2) == {"0+2": ("0.weight", "2.weight"), "4": ("4.weight",)}


def test_weights_between_blocks_join_the_block_before_them() -> None:
    unit = Unit(captured(LanguageModel(is_tied=False), tokens()))
    unit.choose(FindWeights(embeddings=True))
    found = groups(unit, groups=2)
    assert [(fqns[0], fqns[-1]) for fqns in found.values()] == [
        ("tokens.weight", "blocks.0.down.weight"),
        ("blocks.1.up.weight", "head.weight"),
    ]


def test_a_model_without_prunable_weights_is_refused() -> None:
    unit = Unit(captured(nn.LayerNorm(4), torch.randn(2, 4)))
    with pytest.raises(UserError, match="no prunable weight"):
        unit.fact(Partition())
