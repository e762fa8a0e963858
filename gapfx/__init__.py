"""gapfx: a graph-transforming sparsification compiler on torch.fx, trained with scheduled grow-and-prune.

The public names load on first use: `import gapfx` imports neither torch nor deepspeed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gapfx.errors import GapfxError as GapfxError
    from gapfx.errors import UserError as UserError
    from gapfx.holding import Held as Held
    from gapfx.holding import hold as hold
    from gapfx.holding import masks_from_zeros as masks_from_zeros
    from gapfx.io.state_dicts import load_masks as load_masks
    from gapfx.io.state_dicts import load_sparse as load_sparse
    from gapfx.io.state_dicts import save_sparse as save_sparse
    from gapfx.loading import load as load
    from gapfx.plan import Plan as Plan
    from gapfx.schedule import Budget as Budget
    from gapfx.schedule import with_schedule as with_schedule
    from gapfx.sparse import Sparse as Sparse
    from gapfx.sparse import sparsify as sparsify

    __version__: str

# Public name -> the module that defines it.
_PUBLIC = {
    "Budget": "gapfx.schedule",
    "GapfxError": "gapfx.errors",
    "Held": "gapfx.holding",
    "Plan": "gapfx.plan",
    "Sparse": "gapfx.sparse",
    "UserError": "gapfx.errors",
    "hold": "gapfx.holding",
    "load": "gapfx.loading",
    "load_masks": "gapfx.io.state_dicts",
    "load_sparse": "gapfx.io.state_dicts",
    "masks_from_zeros": "gapfx.holding",
    "save_sparse": "gapfx.io.state_dicts",
    "sparsify": "gapfx.sparse",
    "with_schedule": "gapfx.schedule",
}

__all__ = [
    "Budget",
    "GapfxError",
    "Held",
    "Plan",
    "Sparse",
    "UserError",
    "__version__",
    "hold",
    "load",
    "load_masks",
    "load_sparse",
    "masks_from_zeros",
    "save_sparse",
    "sparsify",
    "with_schedule",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _PUBLIC:
        raise AttributeError(f"module 'gapfx' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """Version of the installed distribution; "0+unknown" in a checkout that is not installed."""
    try:
        return importlib.metadata.version("gapfx")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"
