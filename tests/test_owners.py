"""Owners and the form in which each is rewritten."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from gapfx.capture import Capture, eval_reads
from gapfx.owners import build_owners, holders
from tests.models import (
    Attention,
    LanguageModel,
    Tagger,
    TiedPair,
    captured,
    cnn,
    tokens,
    transformer,
    transformer_inputs,
)


def forms(capture: Capture) -> dict[str, tuple[str, str]]:
    return {fqn: (owner.form, owner.reason) for fqn, owner in build_owners(capture).items()}


def test_linear_and_convolution_are_rewritten_in_their_forward() -> None:
    owners = build_owners(captured(cnn(), torch.randn(2, 3, 8, 8)))
    assert {fqn: (owner.form, owner.names) for fqn, owner in owners.items()} == {
        "0": ("forward", ("weight",)),
        "3": ("forward", ("weight",)),
        "7": ("forward", ("weight",)),
    }


def test_an_embedding_is_an_owner() -> None:
    assert forms(captured(Tagger(), tokens()))["embedding"] == ("forward", "")


def test_the_trace_of_an_owner_computes_its_forward() -> None:
    owners = build_owners(captured(cnn(), torch.randn(2, 3, 8, 8)))
    for fqn, x in {"0": torch.randn(2, 3, 9, 9), "3": torch.randn(2, 4, 9, 9), "7": torch.randn(2, 8)}.items():
        owner = owners[fqn]
        assert torch.equal(owner.graph(x), owner.module(x))
        assert owner.graph.weight is owner.module.weight


def test_attention_and_recurrent_layers_are_rewritten_in_their_reads() -> None:
    found = forms(captured(Attention(), torch.randn(2, 5, 8), torch.randn(2, 4, 6)))
    reason = "the forward of MultiheadAttention runs modules of its own"
    assert found["attention"] == ("read", reason)
    assert found["cross.out_proj"][0] == "read"
    lstm = build_owners(captured(Tagger(), tokens()))["lstm"]
    assert (lstm.form, len(lstm.names)) == ("read", 8)
    assert list(cast(dict[str, Any], lstm.graph.graph.output_node().args[0])) == list(lstm.names)


def test_children_of_transformer_layers_are_rewritten_in_their_reads() -> None:
    found = forms(captured(transformer(2), *transformer_inputs()))
    assert found["encoder.layers.0.linear1"] == (
        "read",
        "encoder.layers.0 (TransformerEncoderLayer) can read its weights directly",
    )
    assert {form for form, _ in found.values()} == {"read"}


def test_a_weight_read_by_another_module_is_rewritten_in_its_reads() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.inner(x), self.inner.weight)

    found = forms(captured(nn.Sequential(Reader()), torch.randn(2, 4)))
    assert found == {"0.inner": ("read", "weight is read from outside, by 0")}


def test_inexact_and_replaced_forwards_are_rewritten_in_their_reads() -> None:
    class Scaled(nn.Linear):
        scale = 2.0

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * (self.scale if self.training else 1)

    replaced = nn.Linear(4, 4)
    replaced.forward = lambda input: input @ replaced.weight  # pyright: ignore[reportAttributeAccessIssue]
    found = forms(captured(nn.Sequential(Scaled(4, 4), replaced), torch.randn(2, 4)))
    assert found["0"] == ("read", "the forward of Scaled depends on the training flag")
    assert found["1"] == ("read", "the forward of this Linear was replaced on the object")


def test_a_subclass_that_keeps_the_forward_is_rewritten_in_it() -> None:
    class Named(nn.Linear):
        pass

    assert forms(captured(nn.Sequential(Named(4, 4)), torch.randn(2, 4))) == {"0": ("forward", "")}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_weight_behind_an_old_weight_norm_is_read_by_its_hook() -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)))  # pyright: ignore[reportDeprecated]
    form, reason = forms(captured(model, torch.randn(2, 4)))["0"]
    assert (form, "does not read weight_" in reason) == ("read", True)


def test_a_tied_weight_has_every_module_that_holds_it() -> None:
    found = list(holders(captured(LanguageModel(), tokens())))
    assert [item for item in found if item[0] == "tokens.weight"] == [
        ("tokens.weight", "tokens", "weight"),
        ("tokens.weight", "head", "weight"),
    ]


def test_a_module_under_two_names_is_one_holder() -> None:
    layer = nn.Linear(4, 4)
    capture = captured(nn.Sequential(layer, layer), torch.randn(2, 4))
    assert [item for item in holders(capture) if item[0] == "0.weight"] == [("0.weight", "0", "weight")]
    assert list(build_owners(capture)) == ["0"]


def test_owners_of_a_tied_weight_keep_their_forward() -> None:
    assert forms(captured(TiedPair(), torch.randn(2, 6))) == {"first": ("forward", ""), "second": ("forward", "")}


def test_a_weight_that_another_module_reads_in_eval_alone_is_rewritten_in_its_reads() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x) if self.training else nn.functional.linear(x, self.inner.weight)
            return self.other(x)

    model, x = nn.Sequential(Reader()), torch.randn(2, 4)
    owners = build_owners(captured(model, x), eval_reads(model, lambda module: module(x)))
    assert (owners["0.inner"].form, owners["0.inner"].reason) == ("read", "weight is read from outside in eval, by 0")
    assert owners["0.other"].form == "forward"
