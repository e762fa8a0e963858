"""JSON values as the dataclass that they describe, or one message that names the place of the first mismatch."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, Literal, cast, get_args, get_type_hints

from gapfx.errors import PlanError


def parse(kind: Any, data: Any, where: str) -> Any:
    """JSON value -> the dataclass or plain type `kind`. Raises PlanError with the path of the first mismatch."""
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(cast(type, kind), data, where)
    origin, args = getattr(kind, "__origin__", None), get_args(kind)
    if origin is tuple:
        if not isinstance(data, list):
            raise PlanError(f"expected a list, got {data!r:.60}", where=where)
        return tuple(parse(args[0], item, f"{where}[{i}]") for i, item in enumerate(cast(list[Any], data)))
    if origin is Literal:
        if data not in args:
            raise PlanError(f"{data!r:.60} is not one of {', '.join(map(str, args))}", where=where)
        return data
    is_number = isinstance(data, (int, float)) and not isinstance(data, bool)
    if kind is float and is_number and abs(data) <= sys.float_info.max:  # false for NaN, Infinity and 10**400
        return float(data)
    if kind in (int, str, bool) and type(data) is kind:
        return data
    raise PlanError(f"expected {getattr(kind, '__name__', kind)}, got {data!r:.60}", where=where)


def _parse_dataclass(kind: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise PlanError(f"expected an object with the fields of a {kind.__name__}, got {data!r:.60}", where=where)
    values, hints = cast(dict[str, Any], data), get_type_hints(kind)
    unknown = [name for name in values if name not in hints]
    if unknown:
        raise PlanError(f"unknown field {unknown[0]!r}", where=where, fix=f"known: {', '.join(hints)}")
    fields = dataclasses.fields(kind)
    missing = [
        f.name
        for f in fields
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise PlanError(f"the field {missing[0]!r} is missing", where=where)
    return kind(**{name: parse(hints[name], value, f"{where}.{name}") for name, value in values.items()})
