"""Globs over FQNs, as the options of passes take them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from gapfx.errors import UserError


def matches(glob: str, fqn: str) -> bool:
    """Whether `fqn`, or a module above it, matches; alternatives are separated by `|`.

    `encoder.layers.0` takes every parameter of that layer, `*.fc?.weight` the weights of fc1 and fc2.
    """
    return any(fnmatchcase(fqn, part) or fnmatchcase(fqn, f"{part}.*") for part in glob.split("|"))


def select(glob: str, fqns: Iterable[str], *, option: str) -> tuple[str, ...]:
    """The FQNs that match, in their order; raises UserError with near names when none does."""
    names = list(fqns)
    found = tuple(fqn for fqn in names if matches(glob, fqn))
    if not found:
        near = _near(glob, names)
        raise UserError(
            f"the glob {glob!r} matches no weight",
            where=f"option {option}",
            fix=f"near: {', '.join(near)}" if near else "`gapfx plan` lists the weights",
        )
    return found


def _near(glob: str, fqns: list[str]) -> list[str]:
    """Up to three FQNs, or modules above them, that look like the glob."""
    modules = {fqn.rsplit(".", depth)[0] for fqn in fqns for depth in range(1, fqn.count(".") + 1)}
    return difflib.get_close_matches(glob, [*fqns, *sorted(modules)], n=3, cutoff=0.4) or fqns[:3]
