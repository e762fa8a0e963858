"""Numbers as people read them: counts, shares, seconds and bytes. Plain ASCII, safe for any terminal."""

from __future__ import annotations

import math

MISSING = "-"


def format_integer(value: float | None) -> str:
    """1234567 -> "1,234,567"; nothing or not finite -> "-"."""
    return MISSING if value is None or not math.isfinite(value) else f"{round(value):,}"


def format_count(value: float | None) -> str:
    """Three significant digits and a unit above a hundred thousand: 10485760 -> "10.5 M"."""
    if value is None or not math.isfinite(value):
        return MISSING
    if abs(value) < 1e5:
        return format_integer(value)
    return _scaled(value, 1000, ("", " k", " M", " G", " T", " P"))


def format_bytes(value: float | None) -> str:
    """Binary units: 44040192 -> "42.0 MiB"."""
    if value is None or not math.isfinite(value):
        return MISSING
    return _scaled(value, 1024, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def format_share(value: float | None) -> str:
    """A share as a percentage: 0.9 -> "90.0 %". Only an exact 1 reads "100 %", only an exact 0 reads "0 %"."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value in (0, 1):
        return f"{value:.0%}".replace("%", " %")
    for decimals in (1, 2, 3):
        text = f"{100 * value:.{decimals}f}"
        if 0 < float(text) < 100:
            return f"{text} %"
    return f"{100 * value:.4g} %" if value < 0.5 or value > 1 else "> 99.999 %"


def format_number(value: float | None, digits: int = 4) -> str:
    """A measured number with `digits` significant digits: 0.91234 -> "0.9123", 12345.6 -> "12,346"."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:,.0f}" if 10 ** (digits - 1) <= abs(value) < 1e7 else f"{value:.{digits}g}"


def format_seconds(value: float | None) -> str:
    """A duration in its two largest units: 4325 -> "1 h 12 min"."""
    if value is None or not math.isfinite(value) or value < 0:
        return MISSING
    if value < 10:
        return f"{value:.1f} s" if value % 1 else f"{value:.0f} s"
    seconds = round(value)
    for size, unit, small, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            rest = seconds % size // small
            return f"{seconds // size} {unit} {rest} {small_unit}" if rest else f"{seconds // size} {unit}"
    return f"{seconds} s"


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    index = 0
    while abs(value) >= base and index < len(units) - 1:
        value, index = value / base, index + 1
    if index == 0:
        return f"{value:,.0f}{units[0]}"
    decimals = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{decimals}f}{units[index]}"
