"""HTML and SVG as text that cannot forget to escape: a plain `str` is escaped, a `Markup` is not."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

Attribute = str | int | float | bool | None


class Markup(str):
    """Text that is already HTML."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: Attribute) -> Markup:
    """One element. Attribute `class_` is class, `aria_label` is aria-label; None and False leave it out."""
    head = name + "".join(_attribute(key, value) for key, value in attributes.items())
    body = join(children)
    return Markup(f"<{head}>{body}</{name}>")


def join(parts: Iterable[str]) -> Markup:
    """The parts one after the other, plain text escaped."""
    return Markup("".join(part if isinstance(part, Markup) else html.escape(_printable(part)) for part in parts))


def percent(share: float) -> str:
    """A share of the plot's width as an SVG length: 0.25 -> "25%"."""
    return f"{100 * share:.3f}".rstrip("0").rstrip(".") + "%"


def breakable(fqn: str) -> Markup:
    """A dotted path that may break a line after its dots."""
    return Markup("<wbr>".join(join((part,)) for part in re.split(r"(?<=\.)", fqn)))


def glued(text: str) -> str:
    """The text with numbers that no line break parts from their units."""
    return re.sub(r"(?<=\d) (?=%|(?:[dhskMGT]|min|[KMGT]iB)\b)", "\u00a0", text)


def _attribute(key: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return f' {name}="{html.escape(_printable(text))}"'


def _printable(text: str) -> str:
    """HTML and XML have no way to write control characters, lone surrogates and two codes that are no characters."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)
