"""Soft thresholds with straight-through gradients: ST-3 (Vanderschueren and De Vleeschouwer, WACV 2023).

While a phase softens, forwards see each dense weight w of it as

    c * sign(w) * max(|w| - t, 0),    c = 1.01 / ((mean(|w| m) + 1e-6) / (mean(|w|) + 1e-6) + 0.01)

with t the magnitude of the largest weight that the sparsity of the step would prune, m the mask of those above it and
means over all but the first dimension, which is that of the outputs: c makes up for what an output has lost. The
gradient goes to w as if it were what the forward saw. So weights below t go on learning, and come back. The sparsity
rises from 0 along a cubic, 1 - (1 - x)^3 of the target. The formulas are those of the authors' code.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from gapfx.errors import UserError
from gapfx.pattern import parse_pattern
from gapfx.plan import Phase, Plan, Weight
from gapfx.runtime.engine import Engine
from gapfx.runtime.state import TrainState, whole

_EPSILON, _SOFTEST = 1e-6, 0.01


@dataclass(frozen=True)
class Softening:
    """What a phase softens: its grown weights, by what one threshold is over."""

    phase: Phase
    pools: tuple[tuple[Weight, ...], ...]

    @staticmethod
    def of(plan: Plan, phase: Phase) -> Softening:
        """Nothing for a phase that softens nothing."""
        groups = phase.grow if phase.soften != "no" else ()
        return Softening(phase, tuple(pool for group in groups for pool in plan.pools(plan.groups[group])))

    def depth(self, step: int) -> float:
        """Share of the target sparsity that `step` sees (Zhu and Gupta, 2017, equation 1)."""
        left = 1 - (step - self.phase.start) / self.phase.num_steps
        return 1 - left**3 if self.phase.soften == "ramp" else 1.0

    @contextmanager
    def around(self, engine: Engine, step: int) -> Generator[None]:
        """The engine's parameters are softened while it is open: for forwards and backwards, not for updates."""
        held = {w.fqn: engine.trained[w.fqn].data for pool in self.pools for w in pool if w.fqn in engine.trained}
        try:
            for pool in self.pools:
                for fqn, value in _softened(pool, held, self.depth(step)).items():
                    engine.trained[fqn].data = value.view(held[fqn].shape)
            yield
        finally:
            for fqn, value in held.items():
                engine.trained[fqn].data = value

    def settle(self, state: TrainState) -> None:
        """Make the weights what the last forwards saw, so that a prune takes zeros alone (collective)."""
        for pool in self.pools:
            held = {weight.fqn: whole(state, state.weights, weight.fqn) for weight in pool}
            for fqn, value in _softened(pool, held, self.depth(state.step)).items():
                start, stop = state.bounds(fqn)
                state.weights[fqn] = value.flatten()[start:stop].clone()


def _softened(pool: Sequence[Weight], held: Mapping[str, Tensor], depth: float) -> dict[str, Tensor]:
    found = [weight for weight in pool if weight.fqn in held]
    values = [held[weight.fqn].view(weight.shape) for weight in found]
    return dict(zip((weight.fqn for weight in found), soft_threshold(values, _num_kept(found, depth)), strict=True))


def _num_kept(pool: Iterable[Weight], depth: float) -> int:
    return sum(parse_pattern(w.pattern).num_kept(w.shape, depth * w.sparsity) for w in pool)


def soft_threshold(weights: Sequence[Tensor], num_kept: int) -> list[Tensor]:
    """The weights, of any shapes, as the forward sees them when one threshold over all of them keeps `num_kept`."""
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights]) if weights else torch.zeros(0)
    num_pruned = magnitudes.numel() - num_kept
    threshold = magnitudes.kthvalue(num_pruned).values if num_pruned > 0 else magnitudes.new_tensor(-1.0)
    return [_shrunk(weight, threshold) for weight in weights]


def _shrunk(weight: Tensor, threshold: Tensor) -> Tensor:
    magnitude, axes = weight.abs(), tuple(range(1, weight.dim()))
    live = magnitude > threshold
    mean, left = magnitude.mean(axes, keepdim=True), (magnitude * live).mean(axes, keepdim=True)
    scale = (1 + _SOFTEST) / ((left + _EPSILON) / (mean + _EPSILON) + _SOFTEST)
    return scale * (weight - weight.sign() * threshold.clamp_min(0)) * live


def check_softening(plan: Plan, zero_stage: int) -> None:
    """Raise UserError for a plan whose soft thresholds an engine of this stage, or a pattern, cannot have."""
    if all(phase.soften == "no" for phase in plan.phases):
        return
    if zero_stage == 3:
        raise UserError(
            "a soft threshold takes whole weights, which no rank has at ZeRO stage 3", fix="use --zero 0, 1 or 2"
        )
    for weight in plan.weights():
        if weight.pattern != "unstructured":
            raise UserError(
                f"{weight.fqn} has the pattern {weight.pattern}, which a soft threshold does not keep",
                fix="take another --method, or --pattern unstructured",
            )
