"""Roles by what the forward does with a weight, whatever the model calls it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gapfx.compiler import Unit
from gapfx.passes import FindRoles
from tests.models import (
    LanguageModel,
    Tagger,
    captured,
    resnet50,
    resnet_input,
    tokens,
    transformer,
    transformer_inputs,
)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def roles(model: nn.Module, *inputs: Tensor) -> dict[str, tuple[str, ...]]:
    return {role.name: role.weights for role in Unit(captured(model, *inputs)).fact(FindRoles())}


class Layer(nn.Module):
    """Attention and a gated product, with names that say nothing."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.e, self.f, self.g = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.d(self.attend(self.c(x), self.b(x), self.a(x)))
        return x + self.g(F.silu(self.e(x)) * self.f(x))


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query=q, value=v, key=k)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(8) + torch.zeros(5, 5)
    return F.dropout(scores.softmax(-1), 0.1) @ v


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bqd,bkd->bqk", q, k)
    return torch.einsum("bqk,bkd->bqd", F.softmax(scores, dim=-1), v)


def rotated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * 0.8 + torch.cat((-second, first), -1) * 0.6

    return F.scaled_dot_product_attention(turn(q), turn(k), v)


@pytest.mark.parametrize("attend", [fused, by_hand, by_einsum, rotated])
def test_parts_of_an_attention_and_a_gated_product_are_seen_in_the_flow(attend: Attend) -> None:
    found = roles(nn.Sequential(Layer(attend), Layer(attend)), torch.randn(2, 5, 8))
    names = {name: "".join(fqn.split(".")[1] for fqn in fqns) for name, fqns in found.items()}
    assert names == {"q": "cc", "k": "bb", "v": "aa", "o": "dd", "up": "efef", "down": "gg"}


def test_one_weight_that_makes_q_k_and_v_says_so() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.out(fused(*self.all(x).chunk(3, -1)))

    found = roles(nn.Sequential(Fused(), Fused()), torch.randn(2, 5, 8))
    assert found == {"qkv": ("0.all.weight", "1.all.weight"), "o": ("0.out.weight", "1.out.weight")}


def test_torchs_own_attention_is_known_by_its_names() -> None:
    found = roles(transformer(2), *transformer_inputs())
    assert {name: len(fqns) for name, fqns in found.items()} == {"qkv": 6, "o": 6, "up": 4, "down": 4}


def test_convolutions_are_called_by_their_place_in_the_block() -> None:
    found = roles(resnet50(), resnet_input())
    assert {name: len(fqns) for name, fqns in found.items()} == {
        "conv1": 16,
        "conv2": 16,
        "conv3": 16,
        "downsample.0": 4,
    }


def test_layers_of_a_recurrent_network_share_their_roles() -> None:
    found = roles(Tagger(), tokens())
    assert found["weight_hh_reverse"] == ("lstm.weight_hh_l0_reverse", "lstm.weight_hh_l1_reverse")


def test_weights_outside_of_blocks_have_no_role() -> None:
    found = roles(LanguageModel(is_tied=False), tokens())
    assert found == {
        "up": ("blocks.0.up.weight", "blocks.1.up.weight"),
        "down": ("blocks.0.down.weight", "blocks.1.down.weight"),
    }


def test_a_bottleneck_and_longer_chains_are_neither_up_nor_down() -> None:
    narrow = [nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 8)) for _ in range(2)]
    assert list(roles(nn.Sequential(*narrow), torch.randn(3, 8))) == ["0", "2"]
    chain = [nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 10), nn.Linear(10, 8)) for _ in range(2)]
    assert list(roles(nn.Sequential(*chain), torch.randn(3, 8))) == ["0", "1", "2"]


def test_experts_that_a_router_chooses_have_up_and_down() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(8, 3)
            self.wide, self.narrow = nn.Parameter(torch.randn(3, 8, 16)), nn.Parameter(torch.randn(3, 16, 8))

        def forward(self, x: Tensor) -> Tensor:
            share, choice = self.router(x).softmax(-1).max(-1)
            order = choice.argsort()
            taken, experts = x[order], choice[order]
            out = torch.bmm(torch.relu(torch.bmm(taken[:, None], self.wide[experts])), self.narrow[experts])
            return x + torch.zeros_like(x).index_copy(0, order, out[:, 0] * share[order, None])

    found = roles(nn.Sequential(Routed(), Routed()), torch.randn(5, 8))
    assert {name: len(fqns) for name, fqns in found.items()} == {"router": 2, "up": 2, "down": 2}
