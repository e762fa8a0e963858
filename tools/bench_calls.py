"""What a call of a small layer costs beside its arithmetic: `python tools/bench_calls.py`.

Forward and backward of layers that compute next to nothing: torch's own, with a dense weight, and ours as an op that
goes through torch's dispatcher and called directly. Medians of turns that alternate, microseconds a layer, one thread.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from gapfx.masks import pack
from gapfx.ops import convolution, linear, sparse_convolution, sparse_linear
from gapfx.ops.product import Product
from gapfx.text import table_text

CALLS = 100  # a turn
SETTINGS = convolution.ConvSettings((1, 1), (1, 1), (1, 1), (0, 0)).to_ints()


def layers() -> Iterator[tuple[str, Callable[[], Tensor], Callable[[], Tensor], Callable[[], Tensor]]]:
    """Name, torch's layer, our op and our direct call of a linear layer and a convolution, by both kernels."""
    for module, shape, size, others in (
        (linear, (16, 16), (4, 16), ()),
        (sparse_linear, (16, 16), (4, 16), ()),
        (convolution, (4, 4, 3, 3), (2, 4, 4, 4), (SETTINGS,)),
        (sparse_convolution, (4, 4, 3, 3), (2, 4, 4, 4), (SETTINGS,)),
    ):
        mask = torch.rand(shape) < 0.2
        x, dense = torch.randn(size).requires_grad_(), torch.randn(shape).requires_grad_()
        values, bits = dense.detach()[mask].view(-1, 1).requires_grad_(), pack(mask)
        of_torch = (lambda x, w: F.linear(x, w)) if len(shape) == 2 else (lambda x, w: F.conv2d(x, w, padding=1))
        product: Product = module.PRODUCT
        given = (x, values, bits, None, shape, *others)
        yield (
            module.__name__.rsplit(".", 1)[-1],
            lambda x=x, dense=dense, of_torch=of_torch: of_torch(x, dense),
            lambda product=product, given=given: product.op(*given),
            lambda product=product, given=given: product.direct(*given),
        )


def turn(layer: Callable[[], Tensor]) -> float:
    """Microseconds of one forward and backward."""
    start = time.perf_counter()
    for _ in range(CALLS):
        layer().sum().backward()
    return (time.perf_counter() - start) / CALLS * 1e6


def main(turns: Annotated[int, typer.Option(help="Turns of each way.")] = 30) -> None:
    """Print a table."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows: list[list[str]] = []
    for name, *ways in layers():
        found = [[turn(way) for way in ways] for _ in range(turns + 1)][1:]
        torchs, op, direct = (statistics.median(column) for column in zip(*found, strict=True))
        rows.append([name, f"{torchs:.0f}", f"{op:.0f}", f"{direct:.0f}", f"{direct / op:.2f}"])
    print(table_text(["layer", "torch, dense", "as an op", "direct", "direct / op"], rows, right={1, 2, 3, 4}))


if __name__ == "__main__":
    typer.run(main)
