"""Names of modules and weights as short as a figure needs them, and how wide they come out."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

CHAR = 0.61  # width of a letter of the usual monospaced fonts, in units of the font's size
ELLIPSIS, TIMES = "…", "\u00d7"
NAME_SIZE, SHAPE_SIZE, LABEL_SIZE = 11.0, 10.0, 10.5  # pixels
MAX_NAME = 25  # letters
MIN_PART = 5  # letters of a cut name that are worth reading


def width_of(text: str, size: float) -> float:
    """Estimated pixels of a text in a monospaced font; East Asian letters take two places."""
    return CHAR * size * num_places(text)


def num_places(text: str) -> int:
    """Places of the text in a monospaced font."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def weight_name(fqn: str, box: str) -> str:
    """FQN of a weight inside its box, without `.weight`, its last parts when it is long."""
    name = fqn.removeprefix(f"{box}.") if box else fqn
    return shorten(name.removesuffix(".weight"), MAX_NAME)


def shorten(path: str, limit: int) -> str:
    """The path if it has at most `limit` places, else as much of its end; a long last part loses its middle."""
    if num_places(path) <= limit:
        return path
    parts = path.split(".")
    for start in range(1, len(parts)):
        tail = ELLIPSIS + ".".join(parts[start:])
        if num_places(tail) <= limit:
            room = limit - num_places(tail) - 1
            is_told = "." in tail or room < MIN_PART
            return tail if is_told else f"{ELLIPSIS}{_end(parts[start - 1], room)}.{tail[1:]}"
    last = parts[-1]
    head = _start(last, limit // 2 - 1)
    return head + ELLIPSIS + _end(last, limit - 1 - num_places(head))


def clip(text: str, limit: int) -> str:
    """The text, its end cut off when it has more than `limit` places."""
    return text if num_places(text) <= limit else _start(text, limit - 1) + ELLIPSIS


def shape_text(shape: Sequence[int], fn: str, num_uses: int = 1) -> str:
    """Sizes and function, such as 64 by 3 by 7 by 7 and `conv2d`, with `2 uses` when the module runs more than once."""
    uses = f" ({num_uses} uses)" if num_uses > 1 else ""
    return TIMES.join(map(str, shape)) + f" {fn.strip('_')}{uses}"


def label_lines(name: str, limit: int, num_lines: int) -> list[str]:
    """A box's name, broken behind dots into lines of at most `limit` places; the first ones are left out."""
    lines: list[str] = []
    for part in (f"{piece}." for piece in name.split(".")):
        if lines and num_places(lines[-1] + part) <= limit + 1:
            lines[-1] += part
        else:
            lines.append(part if num_places(part) <= limit else shorten(part.rstrip("."), limit))
    lines[-1] = lines[-1].rstrip(".")
    if len(lines) > num_lines:
        lines = lines[-num_lines:]
        lines[0] = ELLIPSIS + _end(lines[0], limit - 1)
    return lines


def _start(text: str, limit: int) -> str:
    end = len(text)
    while end and num_places(text[:end]) > limit:
        end -= 1
    return text[:end]


def _end(text: str, limit: int) -> str:
    return _start(text[::-1], limit)[::-1]
