"""From settings to the phases of a plan, and whether flags and a plan that is given say the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gapfx.errors import UserError
from gapfx.globs import matches
from gapfx.method_settings import SOME, check_read, unread
from gapfx.plan import Plan
from gapfx.runtime.grow_prune import check_prunes
from gapfx.runtime.soften import check_softening
from gapfx.schedule import SCHEDULES, Budget, with_schedule
from gapfx.settings import Settings, flag

STEPS_WITHOUT_DATA = 1000
# What the flags of the groups and the weights say, and what those of the phases say.
_OF_WEIGHTS = ("sparsity", "groups", "partition", "group", "pattern", "allocation", "criterion", "dense", "passes")
_OF_PHASES = ("rounds", "phase_epochs", "finetune_epochs", *(name for name in SOME if name != "regrow_warmup"))


def with_phases(plan: Plan, settings: Settings, steps_per_epoch: int = 0) -> Plan:
    """The plan with the phase table of the settings; a plan that brings its own phases keeps them.

    Weights that were trained already (`settings.init`) are masked by the criterion, not by chance. Without
    `steps_per_epoch` an epoch has those of the settings, or 1,000. Raises UserError for a table with prunes that a
    pattern, the criterion or the ZeRO stage cannot make.
    """
    phased = plan if plan.phases else _phased(plan, settings, steps_per_epoch)
    if settings.init and phased.start_masks == "random":
        phased = dataclasses.replace(phased, start_masks=settings.criterion)
    check_prunes(phased)
    check_softening(phased, settings.zero)
    return phased


def _phased(plan: Plan, settings: Settings, steps_per_epoch: int) -> Plan:
    epochs = settings.phase_epochs, settings.finetune_epochs
    length = steps_per_epoch or settings.steps_per_epoch or STEPS_WITHOUT_DATA
    phase_steps, finetune_steps = (round(number * length) for number in epochs)
    fixed = settings.state, settings.replicas, settings.update_steps, settings.seed, settings.growth, settings.phase_lr
    fixed += settings.landing, settings.exchange
    budget = Budget(settings.rounds, phase_steps, finetune_steps, *fixed, is_trained=bool(settings.init))
    return with_schedule(plan, settings.method, budget)


def check_flags(plan: Plan, settings: Settings, steps_per_epoch: int, given: Mapping[str, Any], where: str) -> None:
    """Raise UserError for flags that say otherwise than the plan, which decides what they are about.

    `given` are the flags by the names of settings, None where they are not given; the settings hold them all. A plan
    without phases leaves those to the flags.
    """
    names = [name for name in _OF_WEIGHTS if given.get(name) is not None and not _agrees(plan, settings, name)]
    if plan.phases:
        names += _other_phases(plan, settings, steps_per_epoch, given)
    else:
        check_read(settings.method, given)
    if names:
        told = ", ".join(f"{flag(name)} ({getattr(settings, name)!r})" for name in names)
        raise UserError(
            f"the plan decides this, and says otherwise: {told}",
            where=where,
            fix="leave these flags out, or make the plan anew with them by `gapfx plan --json`",
        )


def _agrees(plan: Plan, settings: Settings, name: str) -> bool:
    value, weights = getattr(settings, name), list(plan.weights())
    if name == "sparsity":
        return value == plan.sparsity or all(weight.sparsity == value for weight in weights)
    if name == "groups":
        return value in ("auto", len(plan.groups))
    if name == "pattern":
        return value == "auto" or all(weight.pattern == value for weight in weights)
    if name == "dense":
        return not any(matches(glob, weight.fqn) for glob in value for weight in weights)
    if name == "group":
        pairs = zip(value, plan.groups, strict=False)
        return len(value) == len(plan.groups) and all(matches(g, w.fqn) for g, group in pairs for w in group.weights)
    return value == getattr(plan, name) if name != "passes" else not value


def _other_phases(plan: Plan, settings: Settings, steps_per_epoch: int, given: Mapping[str, Any]) -> list[str]:
    """The flags of phases, where they do not make those of the plan by its method."""
    is_other = given.get("method") not in (None, plan.method)
    names = [name for name in _OF_PHASES if given.get(name) is not None]
    idle = [name for name in names if name in unread(plan.method, given)]
    if not names or _is_made_by(plan, settings, steps_per_epoch):
        names = idle
    return ["method"] * is_other + names


def _is_made_by(plan: Plan, settings: Settings, steps_per_epoch: int) -> bool:
    if plan.method not in SCHEDULES:
        return False
    try:
        return _phased(plan, dataclasses.replace(settings, method=plan.method), steps_per_epoch).phases == plan.phases
    except UserError:
        return False
