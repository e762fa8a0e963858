"""Measured times on disk, one file for each machine and set-up in which they hold."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from gapfx.calibration.cases import Times
from gapfx.doctor import processor
from gapfx.kernels import native


def folder() -> Path:
    """$GAPFX_CACHE, else gapfx/ in the user's cache folder, or in that of temporary files where there is no home."""
    own = os.environ.get("GAPFX_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or _home_cache()) / "gapfx"


def _home_cache() -> Path:
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # a container may run under a user that its system does not know
        return Path(tempfile.gettempdir())


def setting() -> dict[str, object]:
    """All that times depend on beside the case."""
    return {
        "processor": processor(),
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "instructions": native.level(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernels": native.ABI,
        "gapfx": importlib.metadata.version("gapfx"),
    }


@dataclass(frozen=True)
class Found:
    """Times by the key of their case, and a note when the file could not be read."""

    times: Mapping[str, Times]
    note: str = ""


def read_times() -> Found:
    """What was measured here before; a damaged file counts as none, with a note."""
    path = _path()
    try:
        text = path.read_text()
    except FileNotFoundError:
        return Found({})
    except (OSError, UnicodeDecodeError) as error:
        return Found({}, f"{path} cannot be read ({type(error).__name__}): kernels are measured again")
    try:
        data = json.loads(text)
        return Found({key: _times(numbers) for key, numbers in data["times"].items()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return Found({}, f"{path} is damaged: kernels are measured again")


def write_times(times: Mapping[str, Times]) -> str:
    """Add to the file, whole at any moment; why that was not possible, or ""."""
    path = _path()
    merged = {**read_times().times, **times}
    data = {
        "setting": setting(),
        "times": {key: [item.dense, item.expand, item.sparse] for key, item in sorted(merged.items())},
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(data, indent=1))
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()  # half of it, on a full disk
        return f"{path} cannot be written ({type(error).__name__}): kernels will be measured again next time"
    return ""


def _path() -> Path:
    digest = hashlib.sha256(json.dumps(setting(), sort_keys=True).encode()).hexdigest()
    return folder() / f"kernels-{digest[:16]}.json"


def _times(numbers: Any) -> Times:
    dense, expand, sparse = cast(list[Any], numbers)
    for number in (dense, expand, 1.0 if sparse is None else sparse):
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < math.inf:
            raise ValueError(f"{number!r} is no time")
    return Times(float(dense), float(expand), None if sparse is None else float(sparse))
