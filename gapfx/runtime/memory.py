"""Memory that this process has freed goes back to the system, where the C library lets us say so (glibc)."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gapfx.plan import Plan

# glibc's numbers: the parameter of mallopt, and the bounds between which its threshold for mmap moves by itself.
_MMAP_THRESHOLD, _LOWEST, _HIGHEST = -3, 128 * 2**10, 32 * 2**20


@dataclass
class _Resident:
    bytes: int = 0


@dataclass
class _Steps:
    threshold: int = _HIGHEST


_WORTH = 16 * 2**20
_LEAST_OF_STEPS = 2 * 2**20
_ACTIVATIONS = 4
_lowest = _Resident()
_steps = _Steps()


def largest_activation(plan: Plan, element_size: int) -> int:
    """Bytes of the largest input or output of a planned weight in one micro-batch; 0 where the plan does not tell."""
    return max((w.positions * max(w.shape[:2]) * element_size for w in plan.weights()), default=0)


def keep_activations_alone(nbytes: int) -> None:
    """From the next `returning_memory` on steps give back what is much larger than an activation of `nbytes`.

    Such blocks are weights and their gradients, which leave holes in the heap that nothing else fills: a GPT of 86
    million weights took a tenth more. Activations are worth keeping, since each block that is mapped anew is cleared
    page by page: a ResNet-18 took a fifth longer. With 0 all blocks of up to 32 MiB are kept.
    """
    wanted = _ACTIVATIONS * nbytes if nbytes else _HIGHEST
    _steps.threshold = min(_HIGHEST, max(_LEAST_OF_STEPS, wanted))


def release_free_memory() -> None:
    """Collect garbage, and give back what malloc keeps: freed blocks of up to 32 MiB, for ever.

    Does nothing while the process has hardly grown since the last time: to look through it takes longer than that.
    """
    now = resident_bytes()
    if _lowest.bytes and now < _lowest.bytes + _WORTH:
        _lowest.bytes = min(_lowest.bytes, now)
        return
    gc.collect()
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)
    _lowest.bytes = resident_bytes()


def resident_bytes() -> int:
    """Memory of this process that is in RAM now; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def peak_resident_bytes() -> int:
    """The most memory that this process has had in RAM so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def returning_memory() -> Generator[None]:
    """Meanwhile large blocks go back to the system when they are freed, for work that is done once.

    Steps of training would pay for it: each block is a system call, and its pages are cleared again.
    """
    option = _function("mallopt")
    if option is None:
        yield
        return
    option(_MMAP_THRESHOLD, _LOWEST)
    try:
        yield
    finally:
        option(_MMAP_THRESHOLD, _steps.threshold)
        release_free_memory()


@cache
def _function(name: str) -> Any:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return None
