"""Which parameters are prunable, and the reasons of the others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gapfx.compiler import Unit
from gapfx.errors import UserError
from gapfx.passes import FindWeights, TieWeights
from gapfx.passes.find_weights import FoundWeight
from tests.models import (
    LanguageModel,
    Tagger,
    TiedPair,
    captured,
    cnn,
    mlp,
    resnet50,
    resnet_input,
    tokens,
    transformer,
    transformer_inputs,
)


def reasons(unit: Unit, find: FindWeights | None = None) -> dict[str, str]:
    return {item.fqn: item.reason for item in unit.fact(find or FindWeights()).dense}


def prunable(unit: Unit, find: FindWeights | None = None) -> list[str]:
    return [item.fqn for item in unit.fact(find or FindWeights()).prunable]


def test_every_parameter_is_prunable_or_dense_with_a_reason() -> None:
    unit = Unit(captured(transformer(), *transformer_inputs()))
    dense = reasons(unit)
    assert sorted([*prunable(unit), *dense]) == sorted(unit.capture.parameters)
    assert all(dense.values())
    assert dense["encoder.layers.0.norm1.weight"] == "1 dimension(s): a bias, a norm or a scale"


def test_first_convolution_and_classifier_of_a_network_are_prunable() -> None:
    unit = Unit(captured(resnet50(), resnet_input()))
    found = prunable(unit)
    assert (len(found), found[0], found[-1]) == (54, "conv1.weight", "fc.weight")


def test_a_found_weight_knows_its_shape_function_and_size() -> None:
    unit = Unit(captured(cnn(), torch.randn(2, 3, 8, 8)))
    first = unit.fact(FindWeights()).prunable[0]
    assert first == FoundWeight("0.weight", (4, 3, 3, 3), "gemm", "conv2d")
    assert first.numel == 108


def test_an_lstm_is_prunable_and_its_embedding_is_not() -> None:
    unit = Unit(captured(Tagger(), tokens()))
    assert len(prunable(unit)) == 9
    assert reasons(unit)["embedding.weight"] == "an embedding"


def test_embeddings_are_prunable_on_request() -> None:
    unit = Unit(captured(Tagger(), tokens()))
    first = unit.fact(FindWeights(embeddings=True)).prunable[0]
    assert (first.fqn, first.role, first.fn) == ("embedding.weight", "embedding", "embedding")


def test_a_weight_tied_to_an_embedding_stays_dense_unless_asked() -> None:
    unit = Unit(captured(LanguageModel(), tokens()))
    assert reasons(unit)["tokens.weight"] == "tied to the embedding tokens"
    found = unit.fact(FindWeights(embeddings=True)).prunable
    assert [(item.fqn, item.aliases) for item in found if item.fqn == "tokens.weight"] == [
        ("tokens.weight", ("head.weight",))
    ]


class Codebook(nn.Module):
    """Replaces vectors by their nearest entry, which the product with all entries finds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.entries = nn.Linear(4, 4), nn.Parameter(torch.randn(9, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        distances = self.entries.square().sum(1) - 2 * x @ self.entries.T
        return x + (self.entries[distances.argmin(1)] - x).square()


def test_a_codebook_is_a_table_although_its_distances_are_a_product() -> None:
    unit = Unit(captured(Codebook(), torch.randn(3, 4)))
    assert prunable(unit) == ["first.weight"]
    assert reasons(unit)["entries"] == "a table: the root also takes rows of it by getitem"
    assert prunable(unit, FindWeights(embeddings=True)) == ["first.weight", "entries"]


class Relative(nn.Module):
    """Attention scores with a learned vector for each distance."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.table = nn.Linear(4, 4), nn.Parameter(torch.randn(9, 4))

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        rows = self.table[(places[:, None] - places).clamp(-4, 4) + 4]
        return torch.einsum("bid,ijd->bij", self.query(x), rows)


def test_a_table_of_relative_positions_is_an_embedding() -> None:
    unit = Unit(captured(Relative(), torch.randn(2, 5, 4)))
    assert prunable(unit) == ["query.weight"]
    assert reasons(unit)["table"] == "a table: a product takes rows of it, chosen by getitem"


def test_a_weight_tied_by_use_alone_stays_dense_too() -> None:
    class ReadsTable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 4)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.table(x), self.table.weight)

    unit = Unit(captured(ReadsTable(), torch.arange(5)))
    assert reasons(unit) == {"table.weight": "tied to the embedding table"}


def test_the_projection_onto_a_vocabulary_stays_dense_unless_asked() -> None:
    unit = Unit(captured(LanguageModel(is_tied=False), tokens()))
    assert reasons(unit)["head.weight"] == "the output projection onto the 13 entries of tokens.weight"
    assert prunable(unit, FindWeights(embeddings=True))[-1] == "head.weight"


def test_only_the_last_linear_can_be_the_projection_onto_a_vocabulary() -> None:
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8), nn.Linear(8, 3))
    assert prunable(Unit(captured(model, torch.arange(5)))) == ["1.weight", "2.weight"]


def test_two_linears_that_share_a_weight_are_one_prunable_weight() -> None:
    unit = Unit(captured(TiedPair(), torch.randn(2, 6)))
    [found] = unit.fact(FindWeights()).prunable
    assert (found.fqn, found.aliases) == ("first.weight", ("second.weight",))
    assert unit.fact(TieWeights())["first.weight"].embedding == ""


def test_positions_name_the_function_that_uses_them() -> None:
    unit = Unit(captured(LanguageModel(), tokens()))
    assert reasons(unit)["positions"] == "added to activations by add: a position table or a bias"


def test_what_the_forward_does_not_reach_stays_dense() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    unit = Unit(captured(Skips(), torch.randn(2, 4)))
    assert reasons(unit)["unused.weight"] == "the recorded forward does not reach it"


def test_frozen_weights_stay_dense() -> None:
    model = mlp()
    model.get_submodule("2").requires_grad_(False)
    unit = Unit(captured(model, torch.randn(2, 6)))
    assert reasons(unit)["2.weight"] == "it does not require a gradient"


def test_the_magnitude_of_a_weight_norm_stays_dense_and_its_direction_is_prunable() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
    unit = Unit(captured(model, torch.randn(2, 4)))
    assert prunable(unit) == ["0.parametrizations.weight.original1", "1.weight"]
    assert "0.parametrizations.weight.original0" in reasons(unit)


def test_a_table_that_its_forward_writes_to_stays_dense() -> None:
    model = nn.Sequential(nn.Embedding(7, 4, max_norm=1.0), nn.Linear(4, 3))
    unit = Unit(captured(model, torch.arange(5)))
    assert reasons(unit, FindWeights(embeddings=True))["0.weight"] == "its forward writes to it (max_norm)"


@pytest.mark.parametrize(
    ("find", "kept", "reason"),
    [
        (FindWeights(dense=("first",)), "0.weight", "the first prunable weight: option dense"),
        (FindWeights(dense=("last",)), "4.weight", "the last prunable weight: option dense"),
        (FindWeights(dense=("2",)), "2.weight", "option dense=2"),
        (FindWeights(dense=("[2].w*",)), "2.weight", "option dense=[2].w*"),
        (FindWeights(min_numel=30), "4.weight", "24 elements: option min_numel=30"),
    ],
)
def test_options_keep_weights_dense(find: FindWeights, kept: str, reason: str) -> None:
    unit = Unit(captured(mlp(), torch.randn(2, 6)))
    assert reasons(unit, find)[kept] == reason
    assert set(prunable(unit)) - set(prunable(unit, find)) == {kept}


def test_a_glob_may_name_an_alias() -> None:
    unit = Unit(captured(TiedPair(), torch.randn(2, 6)))
    assert reasons(unit, FindWeights(dense=("second",)))["first.weight"] == "option dense=second"


def test_a_glob_that_matches_nothing_lists_near_names() -> None:
    unit = Unit(captured(resnet50(), resnet_input()))
    with pytest.raises(UserError, match=r"'layer5' matches no weight\n  where: option dense.*\n  to do: near: layer"):
        unit.fact(FindWeights(dense=("layer5",)))
