"""The methods, each a function from a budget to a table of phases; importing this package puts them into SCHEDULES."""

from __future__ import annotations

from gapfx.budget import SCHEDULES
from gapfx.schedules.growing import gap, pgap, rgap
from gapfx.schedules.pruning import acdc, dense, gmp, imp, oneshot, snip, st3, static
from gapfx.schedules.rewiring import rigl, set_

__all__ = [
    "SCHEDULES",
    "acdc",
    "dense",
    "gap",
    "gmp",
    "imp",
    "oneshot",
    "pgap",
    "rgap",
    "rigl",
    "set_",
    "snip",
    "st3",
    "static",
]
