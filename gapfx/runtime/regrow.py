"""Warm-up of weights that a phase has grown, against the cold start of Adam where the optimizer state is carried.

A weight that was masked starts with moments of 0, while the optimizer's step t, which all weights share, goes on. Adam
divides its moments by 1 - beta^t to make up for their start at 0, and late in a run that is 1. So the n-th update of a
new weight, under a steady gradient, is (1 - beta1^n) / sqrt(1 - beta2^n) times what it should be: 3.2 times at first,
6.6 times at n = 12 for betas of 0.9 and 0.999, and still 3.2 times at n = 100, so a short ramp alone is no cure. The
update of new weights is therefore multiplied by

    min(1, n / num_steps) * c(beta1) / sqrt(c(beta2)),    c(beta) = (1 - beta^t) / (1 - beta^n)

the second factor of which is Adam's correction for the weight's own age (but for eps, whose weight it changes). At the
phase's end their moments are multiplied by c, so that the shared step is right for them from then on. Optimizers that
correct nothing get the ramp alone. Those whose correction is another one are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gapfx.errors import UserError
from gapfx.masks import unpack
from gapfx.plan import Plan
from gapfx.runtime.engine import Engine
from gapfx.runtime.shards import scalars
from gapfx.runtime.state import TrainState, joined_bits

Betas = tuple[float, float]
# Their update of a weight does not depend on how many steps there were.
UNCORRECTED = (torch.optim.SGD, torch.optim.RMSprop, torch.optim.Rprop, torch.optim.Adagrad, torch.optim.Adadelta)
_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")


@dataclass
class Grown:
    """A parameter with new weights: their `places` in this rank's fragment, and what the optimizer knows of it."""

    parameter: Any
    places: Tensor
    betas: Betas
    before: float
    old: Tensor | None = None

    def correction(self, index: int, age: int) -> float:
        """What a moment of an `age` is multiplied by to be right for the shared step."""
        beta = self.betas[index]
        return (1 - beta ** (self.before + age)) / (1 - beta**age)

    def factor(self, age: int) -> float:
        """Adam's correction of an update for the weights' own age."""
        return self.correction(0, age) / math.sqrt(self.correction(1, age))


@dataclass
class Regrowth:
    """The new weights of one phase in an engine, whose updates it scales. Use `regrowth` to make one."""

    engine: Engine
    num_steps: int
    age: Callable[[], int]
    grown: list[Grown] = field(default_factory=list[Grown])

    @torch.no_grad()
    def before_step(self, *_: object) -> None:
        """Remember the new weights. DeepSpeed calls the optimizer once a parameter group, or more often."""
        for one in self.grown:
            one.old = self._weights(one)[one.places]

    @torch.no_grad()
    def after_step(self, *_: object) -> None:
        """Take back what is too much of their update."""
        age = self.age() + 1
        for one in self.grown:
            weights, old, factor = self._weights(one), one.old, min(1.0, age / self.num_steps) * one.factor(age)
            if old is not None and factor != 1:
                weights[one.places] = old + (weights[one.places] - old) * factor
            one.old = None

    @torch.no_grad()
    def settle(self) -> None:
        """The phase is over: make the moments of new weights those of old ones."""
        for one in self.grown if self.age() else ():
            for key in ("exp_avg", *_SECOND_MOMENTS):
                moment = self._moment(one, key)
                if moment is not None and one.betas != (0.0, 0.0):
                    moment[one.places] *= one.correction(int(key in _SECOND_MOMENTS), self.age())

    def _weights(self, one: Grown) -> Tensor:
        part = self.engine.shards.fragment(one.parameter, None)[1]
        assert part is not None
        return part

    def _moment(self, one: Grown, key: str) -> Tensor | None:
        has_it = any(key in state for state in self.engine.optimizer.state.values())
        return self.engine.shards.fragment(one.parameter, key)[1] if has_it else None


@contextmanager
def regrowth(engine: Engine, state: TrainState, fqns: list[str], start: int, num_steps: int) -> Generator[Regrowth]:
    """Scales updates of the new ones among the grown weights `fqns` while it is open (collective).

    `start` is the phase's first step; `num_steps` the length of the ramp, 0 for none of all this. Raises UserError for
    an optimizer that it does not fit.
    """
    made = Regrowth(engine, num_steps, lambda: state.step - start)
    if not num_steps:
        yield made
        return
    betas = _betas_of(engine.optimizer)
    made.grown = list(_grown(engine, state, fqns, state.step - start, betas))
    hooks = [
        engine.optimizer.register_step_pre_hook(made.before_step),
        engine.optimizer.register_step_post_hook(made.after_step),
    ]
    try:
        yield made
    finally:
        for hook in hooks:
            hook.remove()
        made.grown.clear()


def check_warmup(plan: Plan, num_steps: int) -> None:
    """Raise UserError where a group would lose weights again before their ramp of `num_steps` is over.

    The ramp goes over one phase; where a group is pruned in several steps, the first of them is such a phase.
    """
    for phase in plan.phases:
        if phase.grow and phase.depth < 1 and phase.start and phase.num_steps < num_steps:
            raise UserError(
                f"new weights warm up over {num_steps} steps, but {phase.name!r} prunes after {phase.num_steps}",
                fix=f"give --regrow-warmup of at most {phase.num_steps}, longer phases, or fewer steps of --landing",
            )


def _betas_of(optimizer: torch.optim.Optimizer) -> list[Betas]:
    """Of each parameter group; (0, 0), with which nothing is corrected, where the optimizer corrects nothing."""
    if isinstance(optimizer, torch.optim.Adam):
        return [(float(group["betas"][0]), float(group["betas"][1])) for group in optimizer.param_groups]
    if type(optimizer) in UNCORRECTED:
        return [(0.0, 0.0)] * len(optimizer.param_groups)
    raise UserError(
        f"regrow_warmup does not fit {type(optimizer).__name__}: how it corrects the start of a weight is not known",
        fix="use Adam, AdamW, SGD, RMSprop, Rprop, Adagrad or Adadelta, or take out --regrow-warmup",
    )


def _grown(engine: Engine, state: TrainState, fqns: list[str], age: int, betas: list[Betas]) -> Iterator[Grown]:
    """Those of which this rank holds new weights (collective)."""
    known = scalars(engine.shards, engine.optimizer)
    steps = [float(group.get("step", (0, False))[0]) for group in known] or [0.0] * len(betas)
    for fqn in fqns:
        # Before it grew; the weight itself is all live now, in either form.
        bits = joined_bits(state, fqn, state.sparse_bits[fqn])
        if fqn not in engine.trained:
            continue
        parameter, group = engine.trained[fqn], engine.group_of[fqn]
        start, part = engine.shards.fragment(parameter, None)
        if part is None:
            continue
        new = ~unpack(bits, (state.layout[fqn].numel,))[start : start + part.numel()]
        if bool(new.any()):
            places = new.nonzero().flatten().to(part.device)
            yield Grown(parameter, places, betas[group], steps[group] - age)
