"""Inference of a whole model with random masks through `gapfx.load`, against torch and ONNX Runtime.

    python tools/bench_inference.py                                  # GPT of 86 million weights
    python tools/bench_inference.py --model vit --batch 1 --batch 4
    python tools/bench_inference.py --tokens 1 --values bf16 --values int8

Torch in fp32 and in bf16, ONNX Runtime in fp32 where it is installed, and the loaded sparse model run in one process,
in turns of two calls, of which the second is timed; medians are compared. On one thread the times are those of the
process, which other programs on the machine do not lengthen. A GPT sees one sequence of `tokens`; one token is a step
of decoding without a cache of keys.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import gapfx
from gapfx.bench.onnx_runtime import missing, session_of
from gapfx.calibration.measure import interleaved
from gapfx.kernels.decode import Values
from tools.bench_models import made

Call = Callable[[], object]
BASES = ("torch fp32", "torch bf16", "ONNX Runtime")
Sizes = tuple[str, int, int, int]


def write_run(folder: Path, model: nn.Module, given: Tensor, sparsity: float, pattern: str) -> None:
    """What a finished run of the model leaves, with random masks."""
    sparse = gapfx.sparsify(model, (given,), sparsity=sparsity, criterion="random", pattern=pattern)
    folder.mkdir()
    (folder / "plan.json").write_text(sparse.plan.to_json())
    for name in ("config.json", "summary.json"):
        (folder / name).write_text(json.dumps({}))
    save_file(sparse.dense_state_dict(), folder / "model.safetensors")


def inputs_of(sizes: Sizes) -> tuple[nn.Module, Tensor]:
    """A model in eval, and what it is called with."""
    model, batch, _ = made(*sizes)
    given: Any = batch[:, :-1] if sizes[0] == "gpt" else batch[0]
    return model.eval(), given.contiguous()


def base_calls(sizes: Sizes) -> dict[str, Call]:
    """The dense model: torch in both dtypes, ONNX Runtime."""
    model, given = inputs_of(sizes)
    half = copy.deepcopy(model).bfloat16()
    cast = given.bfloat16() if given.is_floating_point() else given
    calls: dict[str, Call] = {"torch fp32": lambda: model(given), "torch bf16": lambda: half(cast)}
    if not missing():
        calls["ONNX Runtime"] = session_of(model, (given,))
    return calls


def sparse_call(folder: Path, sizes: Sizes, values: Values) -> Call:
    """The loaded run."""
    model, given = inputs_of(sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = gapfx.load(folder, model=model, args=(given,), values=values)
    return lambda: loaded(given)


def measure(sizes: Sizes, masks: list[tuple[float, str]], values: list[Values], seconds: float) -> None:
    """Print a row of a Markdown table for each kind of mask and of values."""
    name, batch, length, _ = sizes
    calls = base_calls(sizes)
    with tempfile.TemporaryDirectory() as scratch:
        for (sparsity, pattern), held in product(masks, values):
            run = Path(scratch) / f"{sparsity} {pattern}".replace(":", "-")
            if not run.exists():
                write_run(run, *inputs_of(sizes), sparsity, pattern)
            calls[f"{sparsity:.0%} | {pattern} | {held}"] = sparse_call(run, sizes, held)
        with torch.inference_mode():
            took = interleaved(calls, seconds, settles=True)
    size = f"{length} tokens" if name == "gpt" else f"batch {batch}"
    for way in [way for way in took if way not in BASES]:
        ratios = " | ".join(f"{took[base] / took[way]:.2f}" if base in took else "-" for base in BASES)
        print(f"| {name}, {size} | {way} | {took[way] * 1e3:.1f} | {ratios} |", flush=True)


def main(
    model: Annotated[str, typer.Option(help="gpt, vit or resnet.")] = "gpt",
    tokens: Annotated[list[int], typer.Option(help="Tokens of the GPT's sequence.")] = [1, 8, 64, 512],  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="Samples of a call.")] = [1],  # noqa: B006
    sparsity: Annotated[list[float], typer.Option(help="Shares of zeros.")] = [0.5, 0.8, 0.9, 0.95],  # noqa: B006
    pattern: Annotated[list[str], typer.Option(help="Patterns of the masks.")] = ["unstructured", "block:4x1"],  # noqa: B006
    values: Annotated[list[str], typer.Option(help="How live values are held: fp32, bf16 or int8.")] = ["fp32"],  # noqa: B006
    layers: Annotated[int, typer.Option(help="Layers of the GPT and of the ViT.")] = 12,
    threads: Annotated[int, typer.Option(help="Threads of torch, of ONNX Runtime and of the kernels.")] = 1,
    seconds: Annotated[float, typer.Option(help="Time for measuring each size, beside what building takes.")] = 20,
) -> None:
    """Print a table: milliseconds, and how many times faster than each dense base."""
    torch.set_num_threads(threads)
    print(f"{threads} thread(s)\n\n| model | sparsity | pattern | values | ms | x {' | x '.join(BASES)} |")
    print("| --- " * 8 + "|")
    for samples, length in product(batch, tokens if model == "gpt" else [0]):
        measure((model, samples, length, layers), list(product(sparsity, pattern)), cast(list[Values], values), seconds)


if __name__ == "__main__":
    typer.run(main)
