"""What a schedule is made from, and what it makes: a budget of steps, and a table of phases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from gapfx.plan import GrowthRule, LrRule, Phase, StateRule
from gapfx.registry import Registry


class Turnover(NamedTuple):
    """What happens to the optimizer state and the learning rate where a phase begins."""

    state: StateRule
    lr: LrRule


RESTARTED, CONTINUED = Turnover("reset", "restart"), Turnover("carry", "continue")


@dataclass(frozen=True)
class Budget:
    """How long a run is: `rounds` turns over all groups, `phase_steps` a group, then `finetune_steps`.

    `state` and `lr` say what happens to the optimizer state and the learning rate where a growing phase begins, "auto"
    what is best for the method, and `growth` what weights start from that grow again; `replicas` is the number of
    models that `pgap` trains side by side, 0 for one a group; `update_steps` lie between two updates of masks in `set`
    and `rigl`, whose phases those are; `seed` draws what a schedule draws; `landing` is the number of prunes in which a
    group goes back to its target, further each time; `exchange` is the share of live weights that the sparse groups of
    `gap` drop and regrow where another one grows, at first; `sparsity` is the target of the whole plan; `is_trained` is
    for trained weights.
    """

    rounds: int
    phase_steps: int
    finetune_steps: int
    state: StateRule | Literal["auto"] = "auto"
    replicas: int = 0
    update_steps: int = 100
    seed: int = 0
    growth: GrowthRule = "zero"
    lr: LrRule | Literal["auto"] = "auto"
    landing: int = 1
    exchange: float = 0.0
    sparsity: float = 0.0
    is_trained: bool = False

    def growing_steps(self, num_groups: int) -> int:
        """Steps before the fine-tune."""
        return self.rounds * num_groups * self.phase_steps

    def total_steps(self, num_groups: int) -> int:
        """Steps of the run."""
        return self.growing_steps(num_groups) + self.finetune_steps

    def finetune(self, start: int, turnover: Turnover) -> tuple[Phase, ...]:
        """The last phase, with all masks fixed, where there are steps for one."""
        if not self.finetune_steps:
            return ()
        stop = start + self.finetune_steps
        return (Phase("fine-tune", start, stop, round=self.rounds, state=turnover.state, lr=turnover.lr),)

    def turnover(self, auto: Turnover) -> Turnover:
        """What happens where a growing phase begins, with `auto` for what is left to the method."""
        return Turnover(auto.state if self.state == "auto" else self.state, auto.lr if self.lr == "auto" else self.lr)


@dataclass(frozen=True)
class Schedule:
    """A phase table, and the criterion that makes the masks before its first phase (see gapfx.plan.Plan)."""

    phases: tuple[Phase, ...]
    start_masks: str = "random"


ScheduleMaker = Callable[[Budget, int], Schedule]
SCHEDULES: Registry[ScheduleMaker] = Registry("method")
# Of schedules that say so: which of the settings that only some methods read they do read.
READS: dict[ScheduleMaker, frozenset[str]] = {}


def reads(*names: str) -> Callable[[ScheduleMaker], ScheduleMaker]:
    """Decorator for a schedule that reads these of the settings in gapfx.method_settings.SOME, and no others.

    On the command line the others are then refused. A schedule that does not say may read all of them.
    """

    def say(maker: ScheduleMaker) -> ScheduleMaker:
        READS[maker] = frozenset(names)
        return maker

    return say
