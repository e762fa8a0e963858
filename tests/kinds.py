"""Small models of many kinds of layers, each with the role of its parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_sequence

from tests.models import Mlp


class Own(nn.Module):
    """Parameters and modules by name, and a forward given as a function of the module and the inputs."""

    def __init__(self, call: Callable[..., Any], **held: Tensor | nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, value in held.items():
            if isinstance(value, nn.Module):
                self.add_module(name, value)
            else:
                self.register_parameter(name, nn.Parameter(value))

    def forward(self, *inputs: Any) -> Any:
        return self.call(self, *inputs)


@dataclass(frozen=True)
class Kind:
    """`roles` is space-separated `fqn=role` of every parameter with two or more dimensions."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    roles: str


def rand(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(*shape),)


def old_weight_norm(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module)


def conv1d_of_gpt2(m: Any, x: Tensor) -> Tensor:
    return torch.addmm(m.bias, x.view(-1, 4), m.weight).view(2, 3, 6)


def experts_by_index(m: Any, x: Tensor) -> Tensor:
    choice, out = m.router(x).argmax(-1), torch.zeros_like(x)
    for expert in choice.unique():
        rows = (choice == expert).nonzero(as_tuple=True)[0]
        gate, up = F.linear(x[rows], m.gate_up[expert]).chunk(2, -1)
        out = out.index_add(0, rows, F.linear(F.silu(gate) * up, m.down[expert]))
    return out


def experts_by_bmm(m: Any, x: Tensor) -> Tensor:
    return torch.bmm(torch.relu(torch.bmm(x.repeat(3, 1, 1), m.gate_up)), m.down).sum(0)


def standardised(m: Any, x: Tensor) -> Tensor:
    w = m.conv.weight
    mean, std = w.mean((1, 2, 3), keepdim=True), w.std((1, 2, 3), keepdim=True)
    return F.conv2d(x, (w - mean) / (std + 1e-5))


def standardised_by_batch_norm(m: Any, x: Tensor) -> Tensor:
    w = m.conv.weight
    return F.conv2d(x, F.batch_norm(w.reshape(1, len(w), -1), None, None, m.gain, training=True).reshape_as(w))


def modulated(m: Any, x: Tensor) -> Tensor:
    w = m.weight * m.style(x.mean((2, 3)))[:, None, :, None, None]
    w = w * torch.rsqrt(w.pow(2).sum((2, 3, 4), keepdim=True) + 1e-5)
    return F.conv2d(x.reshape(1, -1, *x.shape[2:]), w.reshape(-1, *w.shape[2:]), groups=len(x)).view(2, 5, 6, 6)


def mixed_kernels(m: Any, x: Tensor) -> Tensor:
    routing = torch.softmax(m.router(x.mean((2, 3))), 1)
    w = (routing @ m.weight.flatten(1)).view(-1, 4, 3, 3)
    return F.conv2d(x.reshape(1, -1, *x.shape[2:]), w, groups=len(x))


def summed_kernels(m: Any, x: Tensor) -> Tensor:
    routing = torch.softmax(m.router(x.mean((2, 3))), 1)[0]
    return F.conv2d(x, (routing[:, None, None, None, None] * m.weight).sum(0))


def vision(m: Any, x: Tensor) -> Tensor:
    y = m.patch(x).flatten(2).transpose(1, 2)
    y = torch.cat([m.cls_token.expand(len(y), -1, -1), y], 1) + m.positions
    y = y + m.scale * m.mlp(y)
    places = F.interpolate(m.table.permute(0, 3, 1, 2), (2, 2), mode="bilinear").flatten(2).transpose(1, 2)
    queries = m.attend(m.queries.expand(len(y), -1, -1), y + F.pad(places, (0, 0, 1, 0)), y)[0]
    return m.head(m.norm(queries.unflatten(1, (3, 1))).flatten(1))


def low_rank(m: Any, x: Tensor) -> Tensor:
    return m.linear(x) + (x @ m.down.t()) @ m.up.t() * 0.5


def merged_low_rank(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.weight + m.up @ m.down)


def spectral(m: Any, x: Tensor) -> Tensor:
    return torch.fft.irfft(torch.einsum("bif,iof->bof", torch.fft.rfft(x), torch.view_as_complex(m.weight)))


def codebook(m: Any, x: Tensor) -> Tensor:
    distances = x.pow(2).sum(1, keepdim=True) - 2 * x @ m.codes.t() + m.codes.pow(2).sum(1)
    return F.embedding(distances.argmin(1), m.codes)


TWO_AXES: Any = ([2, 3], [0, 1])


def per_head(m: Any, x: Tensor) -> Tensor:
    q, k, v = (torch.einsum("bsd,dhk->bhsk", x, w) for w in m.qkv.unbind(0))
    return torch.tensordot(F.scaled_dot_product_attention(q, k, v).transpose(1, 2), m.out, TWO_AXES)


def state_space(m: Any, x: Tensor) -> Tensor:
    a, hidden, out = -torch.exp(m.a_log), torch.zeros(2, 4, 3), list[Tensor]()
    for step in range(x.shape[1]):
        hidden = torch.exp(a * 0.1) * hidden + m.into(x[:, step])[..., None]
        out.append((hidden * m.c).sum(-1) + m.d[0] * x[:, step])
    kernel = m.conv.weight.squeeze(1)  # read past the convolution, as in the step of a cache
    return m.out(torch.stack(out, 1) + (x[:, -3:] * kernel.t()).sum(1, keepdim=True))


KINDS: dict[str, Kind] = {
    "Conv1D of GPT-2, [in, out]": Kind(
        lambda: Own(conv1d_of_gpt2, weight=torch.randn(4, 6), bias=torch.zeros(6)), rand(2, 3, 4), "weight=gemm"
    ),
    "experts in one tensor, by index": Kind(
        lambda: Own(experts_by_index, router=nn.Linear(4, 3), gate_up=torch.randn(3, 12, 4), down=torch.randn(3, 4, 6)),
        rand(8, 4),
        "gate_up=gemm down=gemm router.weight=gemm",
    ),
    "experts in one tensor, by bmm": Kind(
        lambda: Own(experts_by_bmm, gate_up=torch.randn(3, 4, 6), down=torch.randn(3, 6, 4)),
        rand(8, 4),
        "gate_up=gemm down=gemm",
    ),
    "heads in one tensor": Kind(
        lambda: Own(per_head, qkv=torch.randn(3, 8, 2, 4), out=torch.randn(2, 4, 8)), rand(2, 3, 8), "qkv=gemm out=gemm"
    ),
    "transposed convolutions": Kind(
        lambda: nn.Sequential(
            *(nn.ConvTranspose1d(2, 3, 2), nn.Unflatten(1, (1, 3)), nn.ConvTranspose2d(1, 2, 2)),
            *(nn.Unflatten(1, (1, 2)), nn.ConvTranspose3d(1, 2, 2)),
        ),
        rand(2, 2, 4),
        "0.weight=gemm 2.weight=gemm 4.weight=gemm",
    ),
    "bilinear": Kind(lambda: nn.Bilinear(3, 4, 5), lambda: (torch.randn(2, 3), torch.randn(2, 4)), "weight=gemm"),
    "LSTM with a projection": Kind(
        lambda: nn.LSTM(3, 6, proj_size=4),
        rand(5, 2, 3),
        "weight_ih_l0=gemm weight_hh_l0=gemm weight_hr_l0=gemm",
    ),
    "RNN": Kind(lambda: nn.RNN(3, 4), rand(5, 2, 3), "weight_ih_l0=gemm weight_hh_l0=gemm"),
    "GRU on a packed sequence": Kind(
        lambda: nn.GRU(3, 4, bidirectional=True),
        lambda: (pack_sequence([torch.randn(4, 3), torch.randn(2, 3)]),),
        "weight_ih_l0=gemm weight_hh_l0=gemm weight_ih_l0_reverse=gemm weight_hh_l0_reverse=gemm",
    ),
    "cells": Kind(
        lambda: Own(lambda m, x: m.c(m.b(m.a(x)[0])), a=nn.LSTMCell(3, 4), b=nn.GRUCell(4, 4), c=nn.RNNCell(4, 2)),
        rand(2, 3),
        "a.weight_ih=gemm a.weight_hh=gemm b.weight_ih=gemm b.weight_hh=gemm c.weight_ih=gemm c.weight_hh=gemm",
    ),
    "attention with other widths and learned keys": Kind(
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=5, add_bias_kv=True),
        lambda: (torch.randn(3, 2, 8), torch.randn(4, 2, 6), torch.randn(4, 2, 5)),
        "q_proj_weight=gemm k_proj_weight=gemm v_proj_weight=gemm bias_k=other bias_v=other out_proj.weight=gemm",
    ),
    "a Transformer of torch": Kind(
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 1),
        lambda: (torch.randn(3, 2, 8), torch.randn(4, 2, 8)),
        " ".join(
            f"layers.0.{name}=gemm"
            for name in (
                *("self_attn.in_proj_weight", "self_attn.out_proj.weight", "multihead_attn.in_proj_weight"),
                *("multihead_attn.out_proj.weight", "linear1.weight", "linear2.weight"),
            )
        ),
    ),
    "tables": Kind(
        lambda: Own(
            lambda m, i: m.head(m.a(i) + m.b(i)[:, None]),
            a=nn.Embedding(9, 4),
            b=nn.EmbeddingBag(9, 4),
            head=nn.Linear(4, 2),
        ),
        lambda: (torch.tensor([[1, 2], [3, 4]]),),
        "a.weight=embedding b.weight=embedding head.weight=gemm",
    ),
    "softmax in clusters": Kind(
        lambda: nn.AdaptiveLogSoftmaxWithLoss(6, 12, [4, 8], div_value=2.0),
        lambda: (torch.randn(5, 6), torch.tensor([0, 3, 5, 9, 11])),
        "head.weight=gemm tail.0.0.weight=gemm tail.0.1.weight=gemm tail.1.0.weight=gemm tail.1.1.weight=gemm",
    ),
    "a vision Transformer's tables and tokens": Kind(
        lambda: Own(
            vision,
            cls_token=torch.randn(1, 1, 8),
            positions=torch.randn(1, 5, 8),
            scale=torch.randn(1, 1, 8),
            table=torch.randn(1, 4, 4, 8),
            queries=torch.randn(1, 3, 8),
            patch=nn.Conv2d(3, 8, 4, 4),
            mlp=Mlp(8),
            attend=nn.MultiheadAttention(8, 2, batch_first=True),
            norm=nn.LayerNorm([1, 8]),
            head=nn.Linear(24, 2),
        ),
        rand(2, 3, 8, 8),
        "cls_token=other positions=other scale=other table=other queries=other patch.weight=gemm mlp.up.weight=gemm"
        " mlp.down.weight=gemm attend.in_proj_weight=gemm attend.out_proj.weight=gemm norm.weight=other norm.bias=other"
        " head.weight=gemm",
    ),
    "weight norm, hook and parametrization": Kind(
        lambda: nn.Sequential(old_weight_norm(nn.Conv1d(3, 4, 3)), parametrizations.weight_norm(nn.Conv1d(4, 4, 3))),
        rand(2, 3, 9),
        "0.weight_g=other 0.weight_v=gemm 1.parametrizations.weight.original0=other"
        " 1.parametrizations.weight.original1=gemm",
    ),
    "spectral norm, hook and parametrization": Kind(
        lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 4)), parametrizations.spectral_norm(nn.Linear(4, 4))),
        rand(2, 3),
        "0.weight_orig=gemm 1.parametrizations.weight.original=gemm",
    ),
    "orthogonal weight": Kind(
        lambda: parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley"),
        rand(2, 4),
        "parametrizations.weight.original=other",
    ),
    "standardised convolution": Kind(
        lambda: Own(standardised, conv=nn.Conv2d(3, 4, 3)), rand(2, 3, 6, 6), "conv.weight=other"
    ),
    "convolution standardised by batch norm": Kind(
        lambda: Own(standardised_by_batch_norm, conv=nn.Conv2d(3, 4, 3), gain=torch.ones(4)),
        rand(2, 3, 6, 6),
        "conv.weight=other",
    ),
    "modulated convolution": Kind(
        lambda: Own(modulated, weight=torch.randn(1, 5, 3, 3, 3), style=nn.Linear(3, 3)),
        rand(2, 3, 8, 8),
        "weight=gemm style.weight=gemm",
    ),
    "kernels mixed by a product": Kind(
        lambda: Own(mixed_kernels, weight=torch.randn(3, 5, 4, 3, 3), router=nn.Linear(4, 3)),
        rand(2, 4, 6, 6),
        "weight=gemm router.weight=gemm",
    ),
    "kernels mixed by a sum": Kind(
        lambda: Own(summed_kernels, weight=torch.randn(3, 5, 4, 3, 3), router=nn.Linear(4, 3)),
        rand(2, 4, 6, 6),
        "weight=gemm router.weight=gemm",
    ),
    "low rank beside a linear": Kind(
        lambda: Own(low_rank, linear=nn.Linear(6, 5), down=torch.randn(2, 6), up=torch.randn(5, 2)),
        rand(3, 6),
        "linear.weight=gemm down=gemm up=gemm",
    ),
    "low rank added to a weight": Kind(
        lambda: Own(merged_low_rank, weight=torch.randn(5, 6), down=torch.randn(2, 6), up=torch.randn(5, 2)),
        rand(3, 6),
        "weight=other down=gemm up=gemm",
    ),
    "complex weights held as pairs": Kind(
        lambda: Own(spectral, weight=torch.randn(2, 3, 5, 2)), rand(2, 2, 8), "weight=gemm"
    ),
    "a codebook": Kind(lambda: Own(codebook, codes=torch.randn(6, 4)), rand(3, 4), "codes=gemm"),
    "a state space": Kind(
        lambda: Own(
            state_space,
            a_log=torch.zeros(4, 3),
            c=torch.randn(4, 3),
            d=torch.randn(1, 4),
            into=nn.Linear(4, 4),
            out=nn.Linear(4, 4),
            conv=nn.Conv1d(4, 4, 3, groups=4),
        ),
        rand(2, 5, 4),
        "a_log=other c=other d=other into.weight=gemm out.weight=gemm conv.weight=other",
    ),
}
