"""Options of passes as text: `partition{groups=4,strategy=blocks},insert-masks`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from gapfx.errors import UserError

_ITEM = re.compile(r"\s*([A-Za-z_][\w.-]*)\s*(?:\{([^{}]*)\})?\s*(,|$)")


def split_passes(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(pass name, its options as text), in order; raises UserError at the first character it cannot read."""
    position = 0
    while position < len(text):
        match = _ITEM.match(text, position)
        if not match or (match[3] and match.end() == len(text)):
            raise UserError(
                f"cannot read the passes from {text[position:]!r}",
                where=f"character {position} of {text!r}",
                fix="write them as name{option=value,option=value},name",
            )
        yield match[1], dict(_split_option(item, match[1]) for item in (match[2] or "").split(",") if item.strip())
        position = match.end()


def _split_option(text: str, owner: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"the option {text.strip()!r} of {owner} has no value", fix="write it as option=value")
    return name.strip().replace("-", "_"), value.strip()


def from_text(cls: type, options: Mapping[str, str], owner: str) -> dict[str, Any]:
    """Option texts -> the values that the dataclass `cls` takes; raises UserError for unknown names and values."""
    hints = get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]
    for name in options:
        if name not in known:
            raise UserError(f"{owner} has no option {name!r}", fix=f"known: {', '.join(known) or 'none'}")
    return {name: _value(hints[name], text, f"{owner}{{{name}={text}}}") for name, text in options.items()}


def _value(kind: Any, text: str, where: str) -> Any:
    if get_origin(kind) is tuple:
        return tuple(_value(get_args(kind)[0], part, where) for part in text.split("+") if part)
    if kind is bool and text in ("true", "false"):
        return text == "true"
    if kind is str:
        return text
    if get_origin(kind) is Literal:
        return next((choice for choice in get_args(kind) if str(choice) == text), text)
    try:
        if kind in (int, float):
            return kind(text)
    except ValueError:
        pass
    raise UserError(f"cannot read {text!r} as {_describe(kind)}", where=where)


def to_text(options: Any) -> str:
    """The options of a dataclass that differ from their defaults: `{groups=4,strategy=blocks}`, or nothing."""
    values = [(field, getattr(options, field.name)) for field in dataclasses.fields(options)]
    parts = [f"{field.name}={_text(value)}" for field, value in values if value != field.default]
    return f"{{{','.join(parts)}}}" if parts else ""


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return "+".join(map(_text, cast(tuple[object, ...], value)))
    return str(value).lower() if isinstance(value, bool) else str(value)


def check(options: Any, owner: str) -> None:
    """Raise UserError for a value whose type is not that of its field."""
    hints = get_type_hints(type(options))
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if not _fits(hints[field.name], value):
            kind = _describe(hints[field.name])
            raise UserError(f"{field.name}={value!r} is not {kind}", where=f"options of {owner}")


def _fits(kind: Any, value: object) -> bool:
    if get_origin(kind) is tuple:
        items = cast(tuple[object, ...], value)
        return isinstance(value, tuple) and all(_fits(get_args(kind)[0], item) for item in items)
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is float:
        return isinstance(value, (int, float))
    return not isinstance(kind, type) or isinstance(value, kind)


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return names.get(kind, f"a {kind}")
