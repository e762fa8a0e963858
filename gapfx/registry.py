"""One registry a kind of extension: passes, criteria, patterns, schedules, task formats, writers of events."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from gapfx.errors import UserError
from gapfx.plugins import load_plugins

EntryT = TypeVar("EntryT")
NewT = TypeVar("NewT")


class Registry(Generic[EntryT]):
    """Names of one kind of extension, in the order in which they were registered.

    Plug-ins are loaded when a name is unknown or all names are asked for (see gapfx.plugins). Raises UserError for a
    name that is taken (naming both owners) and for one that is unknown (listing the known, and `unnamed`, what goes
    without a name).
    """

    def __init__(self, kind: str, *, unnamed: str = "") -> None:
        self.kind, self.unnamed = kind, unnamed
        self._entries: dict[str, EntryT] = {}

    def register(self, name: str) -> Callable[[NewT], NewT]:
        """Decorator that puts a class or function under `name`."""

        def add(entry: NewT) -> NewT:
            self.add(name, entry)  # pyright: ignore[reportArgumentType]
            return entry

        return add

    def add(self, name: str, entry: EntryT) -> None:
        """Put `entry` under `name`. Raises UserError for a name that is taken."""
        if name in self._entries:
            owners = f"{_owner(self._entries[name])} and {_owner(entry)}"
            raise UserError(f"two {self.kind} entries are called {name!r}: {owners}", fix="rename one of them")
        self._entries[name] = entry

    def __getitem__(self, name: str) -> EntryT:
        if name not in self:
            near = difflib.get_close_matches(name, self._entries, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            known = ", ".join([*self._entries, *[self.unnamed] * bool(self.unnamed)])
            raise UserError(f"unknown {self.kind} {name!r}", fix=f"{hint}known: {known}")
        return self._entries[name]

    def __contains__(self, name: str) -> bool:
        if name not in self._entries:
            load_plugins()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        load_plugins()
        return iter(self._entries)


def _owner(entry: object) -> str:
    return f"{getattr(entry, '__module__', '?')}.{getattr(entry, '__qualname__', entry)}"
