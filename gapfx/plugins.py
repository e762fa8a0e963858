"""Extensions of other packages, which name a module under the entry point group `gapfx.plugins`."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points

from gapfx.errors import UserError

GROUP = "gapfx.plugins"


@cache
def load_plugins() -> None:
    """Import every module that an installed package names: it registers what it adds. Once in a process.

    Raises UserError that names the package of a module that cannot be imported.
    """
    for entry in entry_points(group=GROUP):
        _load(entry)


def _load(entry: EntryPoint) -> None:
    try:
        entry.load()
    except UserError:
        raise
    except Exception as error:
        package = entry.dist.name if entry.dist else entry.value
        raise UserError(
            f"the plug-in {entry.name!r} cannot be loaded: {type(error).__name__}: {error}",
            where=f"{package} ({entry.value})",
            fix=f"mend it, or take it away with `pip uninstall {package}`",
        ) from error
