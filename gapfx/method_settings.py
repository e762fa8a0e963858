"""Settings that only some methods read: where they are meant for one that does not, they are refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gapfx.budget import READS
from gapfx.errors import UserError
from gapfx.schedules import SCHEDULES
from gapfx.settings import Settings, flag

# All other settings go for every method. Which of these a method reads it says itself (gapfx.budget.reads).
SOME = ("state", "phase_lr", "growth", "landing", "exchange", "update_steps", "regrow_warmup", "replicas")


def unread(method: str, given: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the given values that are other than gapfx's default, and that the method says not to read."""
    read = READS.get(SCHEDULES[method]) if method in SCHEDULES else None
    if read is None:
        return ()
    return tuple(name for name in SOME if name not in read and given.get(name) not in (None, getattr(Settings, name)))


def check_read(method: str, given: Mapping[str, Any], where: str = "") -> None:
    """Raise UserError for given values that the method does not read; it names the methods that do."""
    names = unread(method, given)
    if not names:
        return
    readers = (f"{flag(name)} is for {', '.join(_readers(name))}" for name in names)
    raise UserError(
        f"the method {method} does not read {', '.join(map(flag, names))}",
        where=where,
        fix=f"leave {'it' if len(names) == 1 else 'them'} out, or take another method: {'; '.join(readers)}",
    )


def read_by(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given values without those that the method does not read."""
    names = unread(method, given)
    return {name: value for name, value in given.items() if name not in names}


def as_read(settings: Settings) -> Settings:
    """The settings with gapfx's defaults for what the method does not read: alike for runs that are alike."""
    names = unread(settings.method, vars(settings))
    return dataclasses.replace(settings, **{name: getattr(Settings, name) for name in names})


def _readers(name: str) -> list[str]:
    return [method for method in SCHEDULES if name in READS.get(SCHEDULES[method], ())]
