"""Colours of a figure in light and dark, as plain CSS that needs no variables.

The hues are those of Okabe and Ito, which people with any of the usual colour blindnesses tell apart, and a violet.
Groups from the ninth on take them again with stripes; the number of the group stands beside every weight as well.
"""

from __future__ import annotations

from collections.abc import Iterator

HUES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#6a51c7")
NUM_LOOKS = 2 * len(HUES)
GREY = "#8b949a"

MONO = 'ui-monospace,"SF Mono","Cascadia Code",Menlo,Consolas,"DejaVu Sans Mono",monospace'
SANS = 'system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"DejaVu Sans",sans-serif'

LIGHT = {
    "ground": "#f7f6f3",
    "paper": "#ffffff",
    "ink": "#1d2326",
    "soft": "#4c565c",
    "frame": "#cfd3d4",
    "line": "#7d878d",
}
DARK = {
    "ground": "#14181a",
    "paper": "#1b2023",
    "ink": "#e6e9ea",
    "soft": "#b0babf",
    "frame": "#3a4348",
    "line": "#87939a",
}
TINT = {"#ffffff": 0.20, "#1b2023": 0.22}  # share of the hue in the ground of a weight


def group_class(index: int | None) -> str:
    """CSS class of a group's weights; None is dense."""
    return "d" if index is None else f"g{index % NUM_LOOKS}"


def is_striped(index: int | None) -> bool:
    """Whether the group takes the hue of another one with stripes."""
    return index is not None and index % NUM_LOOKS >= len(HUES)


def style(looks: list[str]) -> str:
    """Rules for the classes in `looks`, in light, and in dark for readers who prefer it."""
    fixed = (
        f"text{{font-family:{SANS};font-size:12px}}"
        f".n,.s,.l,.k{{font-family:{MONO}}}.n{{font-size:11px}}.s{{font-size:10px}}.l{{font-size:10.5px}}"
        ".k{font-size:10px;font-weight:700;text-anchor:middle}.h{font-size:17px;font-weight:650}.b{font-weight:600}"
        ".e{fill:none;stroke-width:1.3}.i{stroke-width:1.3}.m{stroke-width:1.4;fill:none}.a{stroke-dasharray:3 2.5}"
    )
    light, dark = "".join(_rules(LIGHT, looks)), "".join(_rules(DARK, looks))
    return f"{fixed}{light}@media(prefers-color-scheme:dark){{{dark}}}"


def _rules(theme: dict[str, str], looks: list[str]) -> Iterator[str]:
    paper = theme["paper"]
    yield f".ground{{fill:{theme['ground']}}}.box{{fill:{paper};stroke:{theme['frame']}}}"
    yield f".n,.h,.b{{fill:{theme['ink']}}}.s,.l,.t{{fill:{theme['soft']}}}"
    yield f".e,.i,.m{{stroke:{theme['line']}}}.p{{fill:{theme['line']}}}.i{{fill:{paper}}}"
    yield f".f{{fill:none;stroke:{theme['frame']}}}.z{{stroke:{paper}}}"
    for look in looks:
        hue = GREY if look == "d" else HUES[int(look[1:]) % len(HUES)]
        yield f".{look} .c{{fill:{mix(hue, paper, TINT[paper])};stroke:{mix(hue, paper, 0.75)}}}"
        yield f".{look} .q{{fill:{hue}}}.{look} .k{{fill:{_ink_on(hue)}}}"


def mix(colour: str, ground: str, share: float) -> str:
    """`share` of a colour and the rest of another."""
    pairs = zip(_channels(colour), _channels(ground), strict=True)
    return "#" + "".join(f"{round(share * one + (1 - share) * other):02x}" for one, other in pairs)


def contrast(one: str, other: str) -> float:
    """Contrast of two colours as WCAG counts it, 1 to 21."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _ink_on(colour: str) -> str:
    return max(("#ffffff", "#101416"), key=lambda ink: contrast(ink, colour))


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _luminance(colour: str) -> float:
    parts = [part / 255 for part in _channels(colour)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
