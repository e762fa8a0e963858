"""Sparsity patterns: which sets of weights may be zero together, and the exact mask of a score.

A pattern is a frozen dataclass with `mask(score, sparsity)`. Text forms: `unstructured`, `2:4`, `block:4x1`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from gapfx.errors import UserError
from gapfx.kernels import histogram
from gapfx.registry import Registry
from gapfx.threshold import Keys, num_nan

# Scores from which counting their keys is faster than a selection.
_KEYS_FROM = 1 << 14


class Pattern(Protocol):
    """What a sparsity pattern can do; a plug-in writes these four."""

    def mask(self, score: Tensor, sparsity: float) -> Tensor:
        """Bool mask of the score's shape, True = kept, with exactly `num_kept` True values."""
        ...

    def num_kept(self, shape: tuple[int, ...], sparsity: float) -> int:
        """Number of kept weights of a tensor of this shape."""
        ...

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Why a tensor of this shape cannot have the pattern, or None."""
        ...

    @property
    def fixed_sparsity(self) -> float | None:
        """The only sparsity the pattern has, or None where any is possible."""
        ...


Top = Callable[[Tensor, int], Tensor]


@runtime_checkable
class SlicedPattern(Protocol):
    """What a pattern may do beside: mask a weight that ranks hold in slices of its flat order.

    Without it each rank gets the scores of the whole weight for a moment.
    """

    def granule(self, shape: tuple[int, ...]) -> int:
        """Slices begin and end at multiples of this many weights."""
        ...

    def mask_slice(self, score: Tensor, shape: tuple[int, ...], sparsity: float, top: Top) -> Tensor:
        """Flat bool mask of the slice with this flat score, of a weight of `shape`.

        `top(score, num_kept)` gives the mask of the highest scores of all slices together.
        """
        ...


class PatternParser(Protocol):
    """Makes a pattern from the text after the pattern's name."""

    def __call__(self, options: str) -> Pattern:
        """The pattern; raises UserError for options it cannot read."""
        ...


PATTERNS: Registry[PatternParser] = Registry("pattern", unnamed="N:M such as 2:4")


def kept_count(numel: int, sparsity: float) -> int:
    """Nearest whole number of kept items, at least one: a layer without any live weight blocks all signal."""
    return min(numel, max(1, numel - round(numel * sparsity)))


def top_mask(score: Tensor, num_kept: int) -> Tensor:
    """True at the `num_kept` largest scores; among equal scores the lower flat index wins, on every device and rank.

    Raises UserError for scores that are NaN.
    """
    flat = _ordered(score).flatten()
    if num_kept >= flat.numel():
        return torch.ones_like(score, dtype=torch.bool)
    if flat.numel() >= _KEYS_FROM and histogram.can_take(flat):
        keys = Keys.of(flat)
        found = keys.threshold(num_kept)
        return keys.mark(found.key, num_kept - found.num_above).view(score.shape)
    # The k-th largest is the (n - k + 1)-th smallest.
    threshold = flat.kthvalue(flat.numel() - num_kept + 1).values
    mask, tied = flat > threshold, (flat == threshold).nonzero().flatten()
    mask[tied[: num_kept - int(mask.sum())]] = True
    return mask.view(score.shape)


def _ordered(score: Tensor) -> Tensor:
    """The score, detached; NaN has no place in an order, and torch would silently keep too few or the wrong ones."""
    found = num_nan(score)
    if found:
        raise UserError(
            f"{found} of {score.numel()} scores are NaN", fix="look for NaN in the weights: the training may diverge"
        )
    return score.detach()


@dataclass(frozen=True)
class Unstructured:
    """Any weight may be zero."""

    @property
    def fixed_sparsity(self) -> float | None:
        """None: any sparsity."""
        return None

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """None: fits every shape."""
        return None

    def num_kept(self, shape: tuple[int, ...], sparsity: float) -> int:
        """Nearest whole number of weights, at least one."""
        return kept_count(math.prod(shape), sparsity)

    def mask(self, score: Tensor, sparsity: float) -> Tensor:
        """The highest scores of the whole tensor."""
        return self.mask_slice(score, tuple(score.shape), sparsity, top_mask)

    def granule(self, shape: tuple[int, ...]) -> int:
        """Any weight may be the last of a slice."""
        return 1

    def mask_slice(self, score: Tensor, shape: tuple[int, ...], sparsity: float, top: Top) -> Tensor:
        """The highest scores of all slices."""
        return top(_ordered(score), self.num_kept(shape, sparsity))


@dataclass(frozen=True)
class NOfM:
    """In every run of `m` inputs of an output, `n` weights are kept (2:4 is what sparse tensor cores take).

    The inputs of an output are dimension 0's complement, flattened: for a convolution input channel first.
    """

    n: int
    m: int

    @property
    def fixed_sparsity(self) -> float | None:
        """1 - n/m."""
        return 1 - self.n / self.m

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """The inputs of an output must divide into runs of m."""
        if len(shape) < 2:
            return f"it has {len(shape)} dimension(s), runs of inputs need two"
        inputs = math.prod(shape[1:])
        return None if inputs % self.m == 0 else f"{inputs} inputs do not divide into runs of {self.m}"

    def num_kept(self, shape: tuple[int, ...], sparsity: float) -> int:
        """N of every m, whatever `sparsity` says."""
        return math.prod(shape) * self.n // self.m

    def mask(self, score: Tensor, sparsity: float) -> Tensor:
        """The n highest scores of each run; among equal scores the lower index wins."""
        return self.mask_slice(score.flatten(), tuple(score.shape), sparsity, top_mask).view(score.shape)

    def granule(self, shape: tuple[int, ...]) -> int:
        """Whole runs, which follow one another in flat order."""
        return self.m

    def mask_slice(self, score: Tensor, shape: tuple[int, ...], sparsity: float, top: Top) -> Tensor:
        """Runs need no other slice."""
        run_RM = rearrange(_ordered(score), "(r m) -> r m", m=self.m)
        rank_RM = run_RM.sort(dim=-1, descending=True, stable=True).indices.argsort(dim=-1)
        return rearrange(rank_RM < self.n, "r m -> (r m)")


@dataclass(frozen=True)
class Block:
    """Blocks of `rows` outputs x `columns` inputs are zero or kept as one, by the sum of their scores."""

    rows: int
    columns: int

    @property
    def fixed_sparsity(self) -> float | None:
        """None: any sparsity, in steps of a block."""
        return None

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Outputs and flattened inputs must divide into blocks."""
        if len(shape) < 2:
            return f"it has {len(shape)} dimension(s), blocks need two"
        outputs, inputs = shape[0], math.prod(shape[1:])
        if outputs % self.rows == 0 and inputs % self.columns == 0:
            return None
        return f"{outputs} x {inputs} does not divide into blocks of {self.rows} x {self.columns}"

    def num_kept(self, shape: tuple[int, ...], sparsity: float) -> int:
        """Nearest whole number of blocks, at least one, in weights."""
        size = self.rows * self.columns
        return kept_count(math.prod(shape) // size, sparsity) * size

    def mask(self, score: Tensor, sparsity: float) -> Tensor:
        """The blocks with the highest sums."""
        return self.mask_slice(score.flatten(), tuple(score.shape), sparsity, top_mask).view(score.shape)

    def granule(self, shape: tuple[int, ...]) -> int:
        """Whole rows of blocks."""
        return self.rows * math.prod(shape[1:])

    def mask_slice(self, score: Tensor, shape: tuple[int, ...], sparsity: float, top: Top) -> Tensor:
        """The blocks with the highest sums of all slices."""
        size, inputs = {"r": self.rows, "c": self.columns}, math.prod(shape[1:])
        block_OI = reduce(_ordered(score).view(-1, inputs), "(o r) (i c) -> o i", "sum", **size)
        num_blocks = math.prod(shape) // (self.rows * self.columns)
        kept_OI = top(block_OI, kept_count(num_blocks, sparsity))
        return repeat(kept_OI, "o i -> (o r) (i c)", **size).flatten()


@PATTERNS.register("unstructured")
def _unstructured(options: str) -> Pattern:
    if options:
        raise UserError(f"the pattern 'unstructured' takes no options, got {options!r}")
    return Unstructured()


@PATTERNS.register("block")
def _block(options: str) -> Pattern:
    match = re.fullmatch(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})", options)
    if not match:
        raise UserError(f"cannot read the block size {options!r}", fix="write it as rows x columns, such as block:4x1")
    return Block(int(match[1]), int(match[2]))


def parse_pattern(text: str) -> Pattern:
    """`unstructured`, `2:4`, `block:4x1` or a registered `name:options` -> the pattern. Raises UserError."""
    match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    if match:
        n, m = int(match[1]), int(match[2])
        if not 0 < n < m:
            raise UserError(f"the pattern {text!r} keeps {n} of {m}", fix="N:M needs 0 < N < M, such as 2:4")
        return NOfM(n, m)
    name, _, options = text.partition(":")
    return PATTERNS[name](options)
