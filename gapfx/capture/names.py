"""Every name of the modules and tensors of a model, and the path to one of them from inside a module."""

from __future__ import annotations

import keyword
from collections.abc import Iterable
from typing import Any

from torch import fx, nn

# GraphModule's own attributes hide what a model calls by one of these names.
RESERVED = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph()))) - frozenset(dir(nn.Module()))


def is_plain(path: str) -> bool:
    """Whether generated code can write the path as attributes of a GraphModule."""
    return not any(part in RESERVED or keyword.iskeyword(part) for part in path.split("."))


class Names:
    """First FQN of each module, parameter and buffer -> all of its FQNs."""

    def __init__(self, model: nn.Module) -> None:
        self.first = {id(module): fqn for fqn, module in model.named_modules()}
        self._by_fqn = dict(model.named_modules(remove_duplicate=False))
        self._modules = _aliases(self._by_fqn.items())
        tensors = [model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)]
        self._tensors = _aliases(item for items in tensors for item in items)

    def module_path(self, fqn: str, inside: str) -> str:
        """Path of module `fqn` from module `inside`; "" when it does not lie in it."""
        return _relative(self._modules[fqn], inside)

    def tensor_path(self, fqn: str, inside: str) -> str:
        """Path of a parameter or buffer from module `inside`; "" when it does not lie in it."""
        return _relative(self._tensors[fqn], inside)

    def has(self, fqn: str, name: str) -> bool:
        """Whether module `fqn` has something of this name below it."""
        own = vars(self._by_fqn[fqn])
        return any(name in own[table] for table in ("_modules", "_parameters", "_buffers"))


def _aliases(named: Iterable[tuple[str, Any]]) -> dict[str, tuple[str, ...]]:
    by_id: dict[int, list[str]] = {}
    for fqn, item in named:
        by_id.setdefault(id(item), []).append(fqn)
    return {fqns[0]: tuple(fqns) for fqns in by_id.values()}


def _relative(aliases: tuple[str, ...], inside: str) -> str:
    if not inside:
        return aliases[0]
    found = (alias for alias in aliases if alias.startswith(f"{inside}."))
    return next(found, inside)[len(inside) + 1 :]
