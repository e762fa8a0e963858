"""Prints what capture and plan cost for large models, in CPU seconds, against the model's own forward.

    python tools/bench_plan.py              # all models
    python tools/bench_plan.py residual-1000

The limit is three forwards and two seconds. CPU seconds of this process, so that a busy machine shows less. What
`dense` costs grows with the square of its layers, as the edges of its graph do: each layer takes all earlier outputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from gapfx.capture import capture
from gapfx.errors import UserError
from gapfx.sparse import CompileOptions, compile_model

NUM_FORWARDS = 3


class Residual(nn.Module):
    """Two convolutions with norms around an identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm_a, self.norm_b = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return torch.relu(x + self.norm_b(self.b(torch.relu(self.norm_a(self.a(x))))))


class Mlp(nn.Module):
    """One expert."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return self.down(torch.relu(self.up(x)))


class Experts(nn.Module):
    """A layer of experts in a Python loop: each token goes to one of them."""

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, num_experts)
        self.experts = nn.ModuleList(Mlp(width) for _ in range(num_experts))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [N, width]."""
        choice, result = self.router(x).argmax(-1), torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = (choice == index).nonzero(as_tuple=True)
            result[rows] = expert(x[rows])
        return x + result


class Scan(nn.Module):
    """A selective scan written as a loop over time: a handful of small ops for each step."""

    def __init__(self, width: int, state: int = 8) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.randn(width, state))
        self.into, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Batches of sequences [B, T, width]."""
        hidden, outputs = torch.zeros(x.shape[0], *self.decay.shape), list[Tensor]()
        for step in self.into(x).unbind(1):
            hidden = torch.exp(-torch.exp(self.decay)) * hidden + step[..., None]
            outputs.append((hidden * 0.5).sum(-1))
        return x + self.out(torch.stack(outputs, 1))


class Dense(nn.Module):
    """Each layer takes the outputs of all layers before it."""

    def __init__(self, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(growth * (index + 1), growth) for index in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """The output of the last layer, of the input's shape."""
        outputs = [x]
        for layer in self.layers:
            outputs.append(torch.relu(layer(torch.cat(outputs, -1))))
        return outputs[-1]


class Nested(nn.Module):
    """Modules inside of modules, each with a layer of its own."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layer, self.inner = nn.Linear(width, width), Nested(width, depth - 1) if depth > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return self.inner(torch.relu(self.layer(x)))


class Hourglass(nn.Module):
    """Each layer of the second half takes an output of the first half, the last one first."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        kept = list[Tensor]()
        for layer in self.down:
            x = torch.relu(layer(x))
            kept.append(x)
        for layer in self.up:
            x = torch.relu(layer(torch.cat([x, kept.pop()], -1)))
        return x


def transformer(layers: int) -> nn.Module:
    """An encoder of torch's own layers."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


@dataclass(frozen=True)
class Case:
    """A model and its input."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


CASES = {
    "linear-2000": Case(lambda: nn.Sequential(*(nn.Linear(8, 8) for _ in range(2000))), (2, 8)),
    "linear-8000": Case(lambda: nn.Sequential(*(nn.Linear(8, 8) for _ in range(8000))), (2, 8)),
    "residual-1000": Case(lambda: nn.Sequential(*(Residual(4) for _ in range(1000))), (2, 4, 8, 8)),
    "transformer-48": Case(lambda: transformer(48), (2, 16, 32)),
    "transformer-250": Case(lambda: transformer(250), (2, 4, 32)),
    "dense-300": Case(lambda: Dense(2, 300), (2, 2)),
    "nested-100": Case(lambda: Nested(4, 100), (2, 4)),
    "hourglass-500": Case(lambda: Hourglass(4, 500), (2, 4)),
    "experts-64x16": Case(lambda: nn.Sequential(*(Experts(16, 64) for _ in range(16))), (256, 16)),
    "scan-8x128": Case(lambda: nn.Sequential(*(Scan(8) for _ in range(8))), (2, 128, 8)),
}


@dataclass(frozen=True)
class Cost:
    """CPU seconds of a forward (the median of several), of the capture, and of capture, plan and masks."""

    num_weights: int
    num_nodes: int
    forward: float
    capture: float
    plan: float

    @property
    def limit(self) -> float:
        """What capture and plan may cost."""
        return 3 * self.forward + 2


def measure(case: Case) -> Cost:
    """What a model costs; it is masked afterwards."""
    torch.manual_seed(0)
    model, x = case.build(), torch.randn(case.shape)
    forwards = sorted(_seconds(lambda: model(x)) for _ in range(NUM_FORWARDS))
    recorded = capture(model, lambda module: module(x))
    captured = _seconds(lambda: capture(model, lambda module: module(x)))
    planned = _seconds(lambda: compile_model(model, lambda module: module(x), CompileOptions()))
    num_weights = sum(parameter.role == "gemm" for parameter in recorded.parameters.values())
    nodes = len(recorded.graph_module.graph.nodes)
    return Cost(num_weights, nodes, forwards[NUM_FORWARDS // 2], captured, planned)


def _seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main(names: Annotated[list[str] | None, typer.Argument(help="Models to measure; all by default.")] = None) -> None:
    """Print a table of CPU seconds."""
    unknown = [name for name in names or () if name not in CASES]
    if unknown:
        raise UserError(f"no model {unknown[0]!r}", fix=f"choose from {', '.join(CASES)}")
    typer.echo(f"{'model':<16}{'weights':>8}{'nodes':>8}{'forward':>9}{'capture':>9}{'plan':>9}{'limit':>9}")
    for name in names or CASES:
        cost = measure(CASES[name])
        seconds = "".join(f"{value:9.2f}" for value in (cost.forward, cost.capture, cost.plan, cost.limit))
        typer.echo(f"{name:<16}{cost.num_weights:>8}{cost.num_nodes:>8}{seconds}")


if __name__ == "__main__":
    typer.run(main)
