"""How long kernels take to prepare what a mask alone decides: the index of a product, the columns of a convolution."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager

_spent = 0.0


@contextmanager
def preparing() -> Generator[None]:
    """Add the seconds inside to those of `preparation_seconds`."""
    global _spent
    began = time.perf_counter()
    try:
        yield
    finally:
        _spent += time.perf_counter() - began


def preparation_seconds(*, reset: bool = False) -> float:
    """Seconds spent on preparing, for linear layers and convolutions together, since the last reset."""
    global _spent
    spent = _spent
    if reset:
        _spent = 0.0
    return spent
