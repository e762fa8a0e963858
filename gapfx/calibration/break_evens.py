"""Stored gains: what to expect of the sparse kernels on a machine on which nothing was measured.

Ratios of the time of a dense weight to that of the kernel, forward and backward, fp32, one thread, on a Zen 4 core;
the table of a case is the last one that its positions reach. Between two sparsities they are interpolated.
"""

from __future__ import annotations

from gapfx.calibration.cases import Case

# (least positions, ((sparsity, gain), ...)). Below the first no kernel wins.
LINEAR = (
    (0, ((0.0, 0.0),)),
    (16, ((0.0, 0.2), (0.5, 0.4), (0.8, 0.9), (0.9, 1.4), (0.95, 1.9))),
    (64, ((0.0, 0.3), (0.5, 0.6), (0.8, 1.4), (0.9, 2.4), (0.95, 2.6))),
    (512, ((0.0, 0.4), (0.5, 1.15), (0.8, 2.5), (0.9, 4.2), (0.95, 5.7))),
)
CONVOLUTION = (
    (0, ((0.0, 0.0),)),
    (128, ((0.0, 0.2), (0.5, 0.9), (0.8, 1.6), (0.9, 2.5), (0.95, 3.5))),
)
FEW_CHANNELS = 32  # below, a convolution reads too little for each position to gain: 0.9 of dense at 80, 1.1 at 90 %
BLOCKS = 1.15  # of 4 and more rows along the outputs, over single weights
MADE_DENSE = 0.9  # of the weight made dense in each step


def expected_gain(case: Case, *, has_instructions: bool) -> float:
    """Gain of the sparse kernel over a dense weight; 0 where none is to be expected."""
    if not has_instructions:  # the figures are of AVX-512; elsewhere only a measurement can tell
        return 0.0
    if case.settings and min(case.shape[:2]) < FEW_CHANNELS:
        return 0.0
    tables = CONVOLUTION if case.settings else LINEAR
    rows = [rows for least, rows in tables if case.positions >= least][-1]
    gain = _between(rows, case.sparsity)
    return gain * BLOCKS if is_tall_block(case.pattern) else gain


def is_tall_block(pattern: str) -> bool:
    """Whether a pattern keeps or drops four and more outputs of an input together."""
    name, _, sizes = pattern.partition(":")
    rows, _, columns = sizes.partition("x")
    return name == "block" and rows.isdecimal() and int(rows) % 4 == 0 and columns == "1"


def _between(rows: tuple[tuple[float, float], ...], sparsity: float) -> float:
    below = max((row for row in rows if row[0] <= sparsity), default=rows[0])
    above = min((row for row in rows if row[0] >= sparsity), default=below)
    if above[0] == below[0]:
        return below[1]
    share = (sparsity - below[0]) / (above[0] - below[0])
    return below[1] + share * (above[1] - below[1])
