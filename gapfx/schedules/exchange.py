"""What sparse groups exchange on the way: a share of their live weights, dropped and regrown where a phase begins."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

from gapfx.budget import Budget
from gapfx.plan import Phase

# Share of the run after which masks stay (Evci et al., 2020).
UPDATES_UNTIL = 0.75


def falling(share: float, step: int, num_steps: int) -> float:
    """The share at a step of a run: along a cosine to 0 at three quarters of it, share / 2 (1 + cos(pi t / T))."""
    until = UPDATES_UNTIL * num_steps
    return share / 2 * (1 + math.cos(math.pi * step / until)) * (step < until)


def exchanged(budget: Budget, phases: Sequence[Phase]) -> tuple[Phase, ...]:
    """The phases with an exchange where a group grows, and each `phase_steps` of the fine-tune.

    The share is `budget.exchange` at the first step and falls as in RigL; what is regrown is drawn at random, as in
    SET, which takes no memory for gradients; by them it was better in one study and worse in another (ARCHITECTURE.md).
    Not where the fine-tune begins: the group that was pruned last has its masks from that very step.
    """
    return tuple(itertools.chain.from_iterable(_parts(budget, phase, phases[-1].stop) for phase in phases))


def _parts(budget: Budget, phase: Phase, num_steps: int) -> Iterator[Phase]:
    cuts = () if phase.prune else range(phase.start + budget.phase_steps, phase.stop, budget.phase_steps)
    inner = [step for step in cuts if falling(budget.exchange, step, num_steps)]
    for part, (start, stop) in enumerate(itertools.pairwise([phase.start, *inner, phase.stop])):
        drop = falling(budget.exchange, start, num_steps) if start and (part or phase.grow) else 0.0
        name = f"{phase.name}, exchanged {part} times" if part > 1 else f"{phase.name}, exchanged once"
        yield dataclasses.replace(phase, name=name if part else phase.name, start=start, stop=stop, drop=drop)
