"""Speed of the native kernels beside what torch and ONNX Runtime do with the dense weight, paired, on this machine.

    python tools/bench_kernels.py linear
    python tools/bench_kernels.py linear --shapes 768x768,4096x4096 --tokens 512 --sparsities 0.8,0.9 --level avx2
    python tools/bench_kernels.py linear --threads 2
    python tools/bench_kernels.py inference --tokens 1,64
    python tools/bench_kernels.py bits
    python tools/bench_kernels.py adamw

Times are medians of rounds that run every candidate once, so that a change of load meets all alike: processor time of
this process with one thread, wall time with more. Masks are random, packing of activations is included, "x" is how many
times faster than the dense product. Each part of the kernels is a command of its own.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from gapfx.bench.onnx_runtime import missing
from gapfx.kernels import linear as kernels
from gapfx.kernels import native
from gapfx.kernels.decode import with_spare
from gapfx.masks import pack
from gapfx.ops.fixed_linear import fixed_linear

BUDGET_SECONDS = 2.0
MAX_ROUNDS, MIN_ROUNDS = 25, 5
REST_SECONDS = 5e-3  # threads of the library that ran before, which spin for a while, have gone to sleep by then
COLD_BYTES = 1 << 27  # of dense weights in a row: no cache holds them, as those of a model

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
Threads = Annotated[int, typer.Option(help="Threads of torch, ONNX Runtime and the kernels.")]
Level = Annotated[str, typer.Option(help="Instructions that the kernels may use: portable, avx2 or avx512.")]
Listed = Annotated[str, typer.Option(help="Separated by commas.")]


@app.callback()
def main() -> None:
    """One command for each family of kernels."""


@dataclass(frozen=True)
class Timer:
    """Measures candidates side by side."""

    threads: int

    def medians(self, candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """Seconds of each candidate."""
        clock = time.process_time if self.threads == 1 else time.perf_counter
        took: dict[str, list[float]] = {name: [] for name in candidates}
        for run in candidates.values():
            run()
        begin = time.perf_counter()
        for number in range(MAX_ROUNDS):
            for name, run in candidates.items():
                time.sleep(REST_SECONDS if self.threads > 1 else 0)
                start = clock()
                run()
                took[name].append(clock() - start)
            if number + 1 >= MIN_ROUNDS and time.perf_counter() - begin > BUDGET_SECONDS:
                break
        return {name: statistics.median(times) for name, times in took.items()}


def begin(threads: int, level: str) -> Timer:
    """Sets the machine as asked, says how, and gives the clock."""
    library = native.library()
    if library is None:
        raise typer.BadParameter(f"no native kernels: {native.missing_reason()}")
    torch.set_num_threads(threads)
    if level:
        library.gapfx_use_level(native.LEVELS.index(level))
    typer.echo(f"torch {torch.__version__}, kernels {native.level()}, {threads} thread(s)\n")
    return Timer(threads)


def table(*cells: object) -> None:
    """One row of a Markdown table."""
    typer.echo("| " + " | ".join(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |")


def onnx_product(weight: Tensor, threads: int) -> Callable[[Tensor], object] | None:
    """The dense product in ONNX Runtime, fp32; None where it is not installed."""
    if missing():
        return None
    # By name: neither is among what the types are checked with.
    helper: Any = importlib.import_module("onnx.helper")
    numpy_helper: Any = importlib.import_module("onnx.numpy_helper")
    runtime: Any = importlib.import_module("onnxruntime")
    ends = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(np.float32)), None)
        for name in "xy"
    ]
    node, stored = helper.make_node("MatMul", ["x", "w"], ["y"]), numpy_helper.from_array(weight.t().numpy(), "w")
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], [stored])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x.numpy()})


@dataclass(frozen=True)
class Layer:
    """A sparse linear layer and one batch for it; `block` outputs share their inputs."""

    values: Tensor
    index: kernels.Index
    x: Tensor
    gradient: Tensor

    @staticmethod
    def of(x: Tensor, gradient: Tensor, sparsity: float, block: int) -> Layer:
        """With a random mask."""
        outputs, inputs = gradient.shape[1], x.shape[1]
        mask = (torch.rand(outputs // block, inputs) >= sparsity).repeat_interleave(block, 0)
        return Layer(torch.randn(int(mask.sum()), 1), kernels.index_of(pack(mask), mask.shape), x, gradient)

    def forward(self) -> object:
        """The product."""
        return kernels.forward(self.x, self.values, self.index, None)

    def grad_x(self) -> object:
        """The gradient of x alone."""
        return kernels.backward(self.gradient, self.x, self.values, self.index, needs_x=True, needs_values=False)

    def grad_values(self) -> object:
        """The gradient of the live values alone."""
        return kernels.backward(self.gradient, self.x, self.values, self.index, needs_x=False, needs_values=True)

    def backward(self) -> object:
        """Both gradients."""
        return kernels.backward(self.gradient, self.x, self.values, self.index, needs_x=True, needs_values=True)


def cases_of(shapes: str, tokens: str) -> Iterator[tuple[tuple[int, int], int]]:
    """Every shape [outputs, inputs] with every number of tokens."""
    for shape, number in product(shapes.split(","), tokens.split(",")):
        outputs, _, inputs = shape.partition("x")
        yield (int(outputs), int(inputs)), int(number)


def masks_of(sparsities: str, blocks: str) -> list[tuple[float, int]]:
    """Every sparsity with every block."""
    return [(float(sparsity), int(block)) for sparsity, block in product(sparsities.split(","), blocks.split(","))]


def linear_row(timer: Timer, shape: tuple[int, int], num_tokens: int, sparsity: float, block: int) -> None:
    """Forward, both gradients, and all three together, over dense fp32."""
    outputs, inputs = shape
    weight, x, gradient = torch.randn(shape), torch.randn(num_tokens, inputs), torch.randn(num_tokens, outputs)
    layer, onnx = Layer.of(x, gradient, sparsity, block), onnx_product(weight, timer.threads)
    dense: dict[str, Callable[[], object]] = {
        "torch forward": lambda: torch.mm(x, weight.t()),
        "torch x": lambda: torch.mm(gradient, weight),
        "torch weight": lambda: torch.mm(gradient.t(), x),
    }
    if onnx is not None:
        dense["onnx"] = lambda: onnx(x)
    ours = {"forward": layer.forward, "x": layer.grad_x, "values": layer.grad_values, "backward": layer.backward}
    took = timer.medians(dense | ours)
    all_dense = took["torch forward"] + took["torch x"] + took["torch weight"]
    table(
        f"{outputs}x{inputs}",
        num_tokens,
        f"{sparsity:.0%}",
        "4x1" if block > 1 else "-",
        took["onnx"] / took["forward"] if onnx else "-",
        took["torch forward"] / took["forward"],
        took["torch x"] / took["x"],
        took["torch weight"] / took["values"],
        all_dense / (took["forward"] + took["backward"]),
    )


@app.command()
def linear(
    shapes: Listed = "768x768,3072x768,768x3072,4096x4096",
    tokens: Listed = "64,512,4096",
    sparsities: Listed = "0.5,0.8,0.9,0.95",
    blocks: Listed = "1,4",
    threads: Threads = 1,
    level: Level = "",
) -> None:
    """Linear layers in training: forward, gradient of x, gradient of live values."""
    timer = begin(threads, level)
    torch.manual_seed(0)
    table("shape", "tokens", "sparsity", "block", "forward / ONNX", "forward", "grad x", "grad values", "all three")
    table(*["---"] * 9)
    for (shape, num_tokens), mask in product(cases_of(shapes, tokens), masks_of(sparsities, blocks)):
        linear_row(timer, shape, num_tokens, *mask)


def fixed_layers(shape: tuple[int, int], num: int, sparsity: float, block: int) -> list[tuple[Tensor, Tensor]]:
    """Values and bits of sparse weights with random masks."""
    masks = [(torch.rand(shape[0] // block, shape[1]) >= sparsity).repeat_interleave(block, 0) for _ in range(num)]
    return [(with_spare(torch.randn(int(mask.sum()))).view(-1, 1), pack(mask)) for mask in masks]


def inference_rows(timer: Timer, shape: tuple[int, int], num_tokens: int, masks: list[tuple[float, int]]) -> None:
    """One call of each of several layers: dense in fp32, in bf16 and in ONNX Runtime, over those of every mask."""
    num = -(-COLD_BYTES // (4 * shape[0] * shape[1]))
    weights, x = [torch.randn(shape) for _ in range(num)], torch.randn(num_tokens, shape[1])
    halves, half = [weight.bfloat16() for weight in weights], x.bfloat16()
    sessions = [session for weight in weights if (session := onnx_product(weight, timer.threads))]
    calls: dict[str, Callable[[], object]] = {
        "torch fp32": lambda: [torch.mm(x, weight.t()) for weight in weights],
        "torch bf16": lambda: [torch.mm(half, weight.t()) for weight in halves],
    }
    if sessions:
        calls["ONNX Runtime"] = lambda: [session(x) for session in sessions]
    bases = list(calls)
    for sparsity, block in masks:
        layers = fixed_layers(shape, num, sparsity, block)
        calls[f"{sparsity:.0%} | {'4x1' if block > 1 else '-'}"] = lambda layers=layers: [
            fixed_linear(x, values, bits, None, shape) for values, bits in layers
        ]
    took = timer.medians(calls)
    for way in [way for way in calls if way not in bases]:
        each = [took[base] / took[way] for base in bases]
        table(f"{shape[0]}x{shape[1]}", num_tokens, way, f"{took[way] / num * 1e6:.0f}", *each)


@app.command()
def inference(
    shapes: Listed = "768x768,3072x768,768x3072,4096x4096",
    tokens: Listed = "1,8,64,512",
    sparsities: Listed = "0.5,0.8,0.9,0.95",
    blocks: Listed = "1,4",
    threads: Threads = 1,
    level: Level = "",
) -> None:
    """Linear layers at inference, fp32, as many in a row as no cache holds: microseconds, and over dense ones."""
    timer = begin(threads, level)
    torch.manual_seed(0)
    bases = ["x torch fp32", "x torch bf16", *(() if missing() else ("x ONNX",))]
    table("shape", "tokens", "sparsity", "block", "us", *bases)
    table(*["---"] * (5 + len(bases)))
    for shape, num_tokens in cases_of(shapes, tokens):
        inference_rows(timer, shape, num_tokens, masks_of(sparsities, blocks))


def bits_row(timer: Timer, shape: tuple[int, int], sparsity: float, dtype: torch.dtype) -> None:
    """Bytes a second of expand and gather beside a copy and a fill of the dense weight, and torch's own ways."""
    mask = torch.rand(shape) >= sparsity
    packed, dense = pack(mask), torch.randn(shape).to(dtype)
    values, target, other = dense[mask].contiguous(), torch.empty_like(dense), torch.empty_like(dense)
    took = timer.medians(
        {
            "expand": lambda: native.expand(values, packed, target),
            "gather": lambda: native.gather(dense, packed, values),
            "copy": lambda: other.copy_(dense),
            "fill": lambda: other.zero_(),
            "masked_scatter": lambda: torch.zeros(shape, dtype=dtype).masked_scatter_(mask, values),
            "masked_select": lambda: dense.masked_select(mask),
        }
    )
    moved = dense.nbytes + values.nbytes + packed.nbytes
    rates = {name: size / took[name] / 1e9 for name, size in (("expand", moved), ("gather", moved))}
    rates |= {"copy": 2 * dense.nbytes / took["copy"] / 1e9, "fill": dense.nbytes / took["fill"] / 1e9}
    slower = [took[name] / took[ours] for ours, name in (("expand", "masked_scatter"), ("gather", "masked_select"))]
    name = f"{shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')}"
    table(name, f"{sparsity:.0%}", *rates.values(), *slower)


@app.command()
def bits(
    shapes: Listed = "3072x768,8192x8192",
    sparsities: Listed = "0.8,0.9",
    threads: Threads = 1,
    level: Level = "",
) -> None:
    """Live values into a dense weight and back, GB a second of all that is read and written, each byte once."""
    timer = begin(threads, level)
    torch.manual_seed(0)
    table("weight", "sparsity", "expand", "gather", "copy", "fill", "x masked_scatter", "x masked_select")
    table(*["---"] * 8)
    for shape in shapes.split(","):
        outputs, _, inputs = shape.partition("x")
        for sparsity in map(float, sparsities.split(",")):
            for dtype in (torch.float32, torch.bfloat16):
                bits_row(timer, (int(outputs), int(inputs)), sparsity, dtype)


def fused_step(numel: int) -> Callable[[], object]:
    """A step of torch's fused AdamW over so many values."""
    parameter = torch.nn.Parameter(torch.randn(numel))
    parameter.grad = torch.randn(numel)
    return torch.optim.AdamW([parameter], fused=True).step


@app.command()
def adamw(
    numel: Annotated[int, typer.Option(help="Dense weights.")] = 4096 * 4096,
    sparsities: Listed = "0.8,0.9,0.95",
    threads: Threads = 1,
) -> None:
    """Torch's fused AdamW over all weights and over live values alone, beside a copy of as many bytes."""
    timer = begin(threads, "")
    torch.manual_seed(0)
    table("sparsity", "ns a dense weight", "x dense", "GB/s", "copy GB/s")
    table(*["---"] * 5)
    for sparsity in (0.0, *map(float, sparsities.split(","))):
        live = round(numel * (1 - sparsity))
        source, target = torch.randn(live * 7 // 2), torch.empty(live * 7 // 2)
        calls = {"dense": fused_step(numel), "live": fused_step(live), "copy": lambda s=source, t=target: t.copy_(s)}
        took, moved = timer.medians(calls), 28 * live  # weight and both moments read and written, gradient read
        rates = [moved / took[name] / 1e9 for name in ("live", "copy")]
        table(f"{sparsity:.0%}", f"{took['live'] / numel * 1e9:.3f}", took["dense"] / took["live"], *rates)


if __name__ == "__main__":
    app()
