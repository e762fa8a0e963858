"""What the environment variable GAPFX_NATIVE says about the native kernels."""

from __future__ import annotations

import os

LEVELS = ("portable", "avx2", "avx512")
_OFF = "0"


def is_off() -> bool:
    """Whether torch shall serve in place of the kernels."""
    return os.environ.get("GAPFX_NATIVE") == _OFF


def highest_level() -> str:
    """The level of instructions that the kernels shall not go beyond; "" for the processor's own."""
    word = os.environ.get("GAPFX_NATIVE", "")
    return word if word in LEVELS else ""


def problem() -> str:
    """What is wrong with the variable; "" when nothing is."""
    word = os.environ.get("GAPFX_NATIVE", "")
    if word in ("", _OFF, *LEVELS):
        return ""
    return f"GAPFX_NATIVE is {word!r}: it may be {_OFF} (no native kernels) or {', '.join(LEVELS[:-1])} or {LEVELS[-1]}"
