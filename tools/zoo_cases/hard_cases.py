"""Hand-made models, each with one thing that is hard to capture or to mask."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tools.zoo_cases.cases import Case, Inputs

Forward = Callable[[Any, Tensor], Any]
WIDTH = 8
RECURRENT = ("rnn", "lstm", "lstm-projected", "gru", "rnn-cell", "lstm-cell", "gru-cell")


class Made(nn.Module):
    """Modules and parameters by name, and a forward of them."""

    def __init__(self, parts: Mapping[str, nn.Module | nn.Parameter], run: Forward) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            else:
                self.register_parameter(name, part)
        self._run = run

    def forward(self, x: Tensor) -> Any:
        """What `run` makes of the model and the input."""
        return self._run(self, x)


class Multiply(torch.autograd.Function):
    """A matrix product that autograd sees as one op."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """`x @ weight.T`."""
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of both operands."""
        x, weight = ctx.saved_tensors
        return grads[0] @ weight, grads[0].flatten(0, -2).T @ x.flatten(0, -2)


@dataclass
class Answer:
    """A structure that a forward returns."""

    scores: Tensor
    hidden: dict[str, Tensor]


def cases() -> list[Case]:
    """Vector inputs [batch, 8], sequences [batch, 5, 8] and images [batch, 3, 12, 12]."""
    groups = ((VECTORS, (WIDTH,)), (SEQUENCES, (5, WIDTH)), (IMAGES, (3, 12, 12)))
    return [_case(name, build, shape) for builds, shape in groups for name, build in builds.items()]


def _case(name: str, build: Callable[[], nn.Module], shape: tuple[int, ...]) -> Case:
    kind = "recurrent" if name in RECURRENT else "one hard thing"
    return Case("hand-made", name, name, build, lambda size: Inputs((torch.randn(size, *shape),)), kind=kind)


def _weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape or (WIDTH, WIDTH)) / WIDTH**0.5)


def _linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


def _two(run: Forward) -> Callable[[], nn.Module]:
    return lambda: Made({"first": _linear(), "last": _linear()}, run)


def _raw(run: Forward, *shape: int) -> Callable[[], nn.Module]:
    return lambda: Made({"weight": _weight(*shape), "last": _linear()}, lambda m, x: m.last(run(m, x)))


def _tied() -> nn.Module:
    model = Made({"first": _linear(), "last": _linear()}, lambda m, x: m.last(m.first(x).relu()))
    model.get_submodule("last").weight = model.get_submodule("first").weight
    return model


def _in_place(m: Any, x: Tensor) -> Tensor:
    hidden = m.first(x)
    hidden[:, :4].mul_(2)
    hidden[:, 4:] += x[:, 4:]
    return m.last(hidden.relu_())


def _experts(m: Any, x: Tensor) -> Tensor:
    choice = m.first(x).argmax(-1) % 3
    out = torch.zeros_like(x)
    for index, expert in enumerate((m.one, m.two, m.three)):
        chosen = (choice == index).nonzero().flatten()
        if len(chosen):
            out = out.index_add(0, chosen, expert(x[chosen]))
    return m.last(out)


def _routed() -> nn.Module:
    return Made({name: _linear() for name in ("first", "one", "two", "three", "last")}, _experts)


def _keywords() -> nn.Module:
    names = ("self", "lambda", "code", "graph")
    return Made(
        {name: _linear() for name in names},
        lambda m, x: m._modules["lambda"](m._modules["self"](x)) + m.code(m.graph(x)),
    )


def _thousand() -> nn.Module:
    return nn.Sequential(*[layer for _ in range(500) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())])


def _script() -> nn.Module:
    inner = nn.Sequential(_linear(), nn.ReLU(), _linear())
    return Made({"inner": torch.jit.script(inner), "last": _linear()}, lambda m, x: m.last(m.inner(x)))


def _recurrent(kind: Callable[..., nn.Module], **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        rnn = kind(WIDTH, WIDTH, 2, batch_first=True, bidirectional=True, **options)
        size = 2 * int(options.get("proj_size") or WIDTH)
        return Made({"rnn": rnn, "last": nn.Linear(size, 4)}, lambda m, x: m.last(m.rnn(x)[0]))

    return build


def _cells(kind: type[nn.Module]) -> Callable[[], nn.Module]:
    def run(m: Any, x: Tensor) -> Tensor:
        state = None
        for step in range(x.shape[1]):
            state = m.cell(x[:, step], state)
        assert state is not None
        return m.last(state[0] if isinstance(state, tuple) else state)

    return lambda: Made({"cell": kind(WIDTH, WIDTH), "last": _linear()}, run)


def _attention(**options: Any) -> Callable[[], nn.Module]:
    return lambda: Made(
        {"mha": nn.MultiheadAttention(WIDTH, 2, batch_first=True, dropout=0.1, **options), "last": _linear()},
        lambda m, x: m.last(m.mha(x, x, x, need_weights=False)[0]),
    )


def _encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True), 2)


def _normed(norm: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(norm(_linear()), nn.ReLU(), _linear())


def _conv(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True), *layers)


def _folded() -> nn.Module:
    return Made(
        {"conv": nn.Conv1d(3, WIDTH, 3), "up": nn.ConvTranspose1d(WIDTH, 4, 3)}, lambda m, x: m.up(m.conv(x[:, :, 0]))
    )


def _solid() -> nn.Module:
    return Made(
        {"conv": nn.Conv3d(3, WIDTH, 3, padding=1), "up": nn.ConvTranspose3d(WIDTH, 4, 2)},
        lambda m, x: m.up(m.conv(x[:, :, :, None, :])),
    )


VECTORS: dict[str, Callable[[], nn.Module]] = {
    "functional": _two(lambda m, x: F.linear(F.gelu(F.linear(x, m.first.weight, m.first.bias)), m.last.weight)),
    "in-place-views": _two(_in_place),
    "dropout": _two(lambda m, x: m.last(F.dropout(m.first(x), 0.5, m.training))),
    "noise": _two(lambda m, x: m.last(m.first(x) + torch.randn_like(x))),
    "autograd-function": _raw(lambda m, x: Multiply.apply(x, m.weight)),
    "checkpoint": _two(lambda m, x: m.last(checkpoint(lambda y: m.first(y).relu(), x, use_reentrant=False))),
    "checkpoint-reentrant": _two(
        lambda m, x: m.last(checkpoint(lambda y: m.first(y).relu(), x.requires_grad_(), use_reentrant=True))
    ),
    "tied": _tied,
    "called-twice": _two(lambda m, x: m.last(m.first(m.first(x).relu()))),
    "called-twice-in-two-shapes": _two(lambda m, x: m.last(m.first(x)) + m.first(x[:1]).sum()),
    "named-like-keywords": _keywords,
    "returns-a-dict": _two(lambda m, x: OrderedDict(scores=m.last(m.first(x)), inner={"hidden": m.first(x)})),
    "returns-a-dataclass": _two(lambda m, x: Answer(m.last(m.first(x)), {"hidden": m.first(x)})),
    "value-dependent-branch": _two(lambda m, x: m.last(m.first(x)) if bool(x.sum() > -1e9) else m.first(x)),
    "routed-experts": _routed,
    "script-module": _script,
    "matmul": _raw(lambda m, x: x @ m.weight),
    "transposed": _raw(lambda m, x: torch.matmul(x, m.weight.t())),
    "addmm": _raw(lambda m, x: torch.addmm(x, x, m.weight)),
    "einsum": _raw(lambda m, x: torch.einsum("bi,hij->bj", x, m.weight), 2, WIDTH, WIDTH),
    "bmm-experts": _raw(lambda m, x: torch.bmm(x.expand(3, *x.shape), m.weight).sum(0), 3, WIDTH, WIDTH),
    "indexed-experts": _raw(lambda m, x: x @ m.weight[0] + x @ m.weight[2], 3, WIDTH, WIDTH),
    "chunked": _raw(lambda m, x: sum(F.linear(x, part) for part in m.weight.chunk(2)), 2 * WIDTH, WIDTH),
    "bilinear": lambda: Made(
        {"pair": nn.Bilinear(WIDTH, WIDTH, 4), "last": nn.Linear(4, 4)}, lambda m, x: m.last(m.pair(x, x))
    ),
    "weight-norm": _normed(parametrizations.weight_norm),
    "weight-norm-by-hook": _normed(torch.nn.utils.weight_norm),
    "spectral-norm": _normed(parametrizations.spectral_norm),
    "thousand-modules": _thousand,
}
SEQUENCES: dict[str, Callable[[], nn.Module]] = {
    "rnn": _recurrent(nn.RNN),
    "lstm": _recurrent(nn.LSTM, dropout=0.2),
    "lstm-projected": _recurrent(nn.LSTM, proj_size=4),
    "gru": _recurrent(nn.GRU),
    "rnn-cell": _cells(nn.RNNCell),
    "lstm-cell": _cells(nn.LSTMCell),
    "gru-cell": _cells(nn.GRUCell),
    "attention": _attention(),
    "attention-kdim": _attention(kdim=WIDTH, vdim=WIDTH, bias=False),
    "transformer-encoder": _encoder,
}
IMAGES: dict[str, Callable[[], nn.Module]] = {
    "batch-norm": lambda: _conv(nn.Flatten(), nn.Linear(WIDTH * 144, 4)),
    "depthwise": lambda: _conv(nn.Conv2d(WIDTH, WIDTH, 3, groups=WIDTH), nn.Conv2d(WIDTH, 4, 1)),
    "transposed-convolution": lambda: _conv(nn.ConvTranspose2d(WIDTH, 4, 2, stride=2)),
    "convolution-1d": _folded,
    "convolution-3d": _solid,
    "circular-padding": lambda: _conv(nn.Conv2d(WIDTH, 4, 3, padding=1, padding_mode="circular")),
}
SAMPLE = (*VECTORS, *SEQUENCES, *IMAGES)
