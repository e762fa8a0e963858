"""Learning-rate factors: what the base rate of the optimizer is multiplied by at each step of a phase."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from gapfx.errors import TaskError
from gapfx.plan import Phase

LrFactor = Callable[[int, int], float]
WARMUP_SHARE = 0.1


def warmup_cosine(step: int, num_steps: int) -> float:
    """Linear warm-up over a tenth of the steps, then half a cosine down to 0 (Loshchilov and Hutter, 2017)."""
    warmup = max(1, round(num_steps * WARMUP_SHARE))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def scaled(factor: LrFactor, scale: float) -> LrFactor:
    """The factor times `scale`, at every step. Raises TaskError for a factor that is no number from 0 up."""

    def at(step: int, num_steps: int) -> float:
        value: Any = factor(step, num_steps)  # a task may return anything
        if isinstance(value, bool) or not isinstance(value, float | int) or not 0 <= value < math.inf:
            raise TaskError(
                f"lr({step}, {num_steps}) returned {value!r:.80}",
                fix="return what the optimizer's learning rate is multiplied by: a number, 0 or more",
            )
        return scale * value

    return at


def factor_at(step: int, phase: Phase, num_steps: int, factor: LrFactor) -> float:
    """The factor of a run's `step`: in the phase's own schedule where it restarts, else over the whole run."""
    if phase.lr == "restart":
        return factor(phase.lr_skip + step - phase.start, phase.lr_steps or phase.num_steps)
    return factor(step, num_steps)
