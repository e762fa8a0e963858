"""Lookups: an index that asks for rows of a parameter, which is then a table, as an embedding is."""

from __future__ import annotations

from typing import Any

from torch import fx

from gapfx.capture.nodes import argument_places, fn_of
from gapfx.capture.opsets import SELECTS


def is_lookup(value: fx.Node, user: fx.Node, active: set[fx.Node]) -> bool:
    """Whether `user` takes rows of `value` by a tensor of indices.

    Matrices chosen by the data are experts, and an index that only changes the order is a view: neither is a lookup.
    """
    if fn_of(user) not in SELECTS or not argument_places(value, user) <= {0, "input"}:
        return False
    entries = _entries(user)
    tensors = [entry for entry in entries if isinstance(entry, fx.Node) and entry.meta.get("shape")]
    if not tensors or user.meta.get("shape") == value.meta.get("shape"):
        return False
    if fn_of(user) in ("gather", "take_along_dim"):
        return True
    chosen = [entry for entry in entries if isinstance(entry, (int, fx.Node)) and not isinstance(entry, bool)]
    is_row = len(value.meta.get("shape", ())) - len(chosen) <= 1
    return is_row or active.isdisjoint(tensors)


def _entries(user: fx.Node) -> list[Any]:
    """What stands in the brackets."""
    if fn_of(user) in ("getitem", "index"):
        index: Any = user.args[1]
        return list(index) if isinstance(index, (tuple, list)) else [index]
    return [entry for entry in (*user.args[1:], *user.kwargs.values()) if isinstance(entry, fx.Node)]
