"""Why no sparse kernel takes a case."""

from __future__ import annotations

import torch

from gapfx.calibration.cases import DTYPES, Case
from gapfx.ops import sparse_convolution, sparse_linear


def refusal(case: Case) -> str:
    """The reason, "" when one takes it."""
    if torch.cuda.is_available():
        return "the kernels that skip zeros are for the CPU"
    if case.settings:
        return sparse_convolution.refusal(case.shape, case.settings, DTYPES[case.dtype])
    return sparse_linear.refusal(case.shape, DTYPES[case.dtype])
