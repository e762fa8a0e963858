"""What is measured: one product or convolution with a frozen sparse weight, as a training step runs it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from gapfx.plan import Kernel

Dtype = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """A weight of `shape` in one place of a model.

    `sizes` are those of the output without its channels: (rows,) of a product, (batch, height, width) and the like of
    a convolution, whose `settings` are the numbers of gapfx.ops.convolution.ConvSettings.
    """

    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    sparsity: float
    pattern: str = "unstructured"
    settings: tuple[int, ...] = ()
    dtype: Dtype = "fp32"

    @property
    def positions(self) -> int:
        """Rows of the product, or positions of the output over the batch: how often each weight is used."""
        return math.prod(self.sizes)

    @property
    def work(self) -> int:
        """Multiplications of the dense forward."""
        return self.positions * math.prod(self.shape)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the smallest input that gives such an output."""
        if not self.settings:
            return (*self.sizes, self.shape[1])
        dims = len(self.shape) - 2
        stride, padding, dilation = (self.settings[at * dims : (at + 1) * dims] for at in range(3))
        sizes = [
            max(1, (out - 1) * step + gap * (taps - 1) + 1 - 2 * pad)
            for out, step, pad, gap, taps in zip(self.sizes[1:], stride, padding, dilation, self.shape[2:], strict=True)
        ]
        return (self.sizes[0], self.shape[1] * self.settings[-2], *sizes)

    def key(self) -> str:
        """One word that says it all, for files."""
        parts = ["x".join(map(str, numbers)) for numbers in (self.shape, self.sizes, self.settings)]
        return "/".join([*parts, f"{self.sparsity:g}", self.pattern, self.dtype])


@dataclass(frozen=True)
class Times:
    """Seconds of forward and backward together: of a dense weight, and of live values.

    `expand` makes them dense first, `sparse` skips the zeros; None where no kernel does.
    """

    dense: float
    expand: float
    sparse: float | None = None

    def of(self, kernel: Kernel) -> float:
        """Seconds with a kernel; those of `expand` where the sparse one is missing."""
        return self.sparse if kernel == "sparse" and self.sparse is not None else self.expand

    def __add__(self, other: Times) -> Times:
        sparse = None if self.sparse is None or other.sparse is None else self.sparse + other.sparse
        return Times(self.dense + other.dense, self.expand + other.expand, sparse)
