"""Reads of parameters in a recorded graph, each with the role of its first consumer that is not a view."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx, nn

from gapfx.capture.facts import Parameter, ParameterRole, Use, UseRole
from gapfx.capture.opsets import (
    EMBEDDING,
    GEMM,
    GEMM_MODULES,
    KEEPS_FIRST,
    KEEPS_ZEROS,
    LIKE_FIRST,
    LIKE_SECOND,
    SELECTS,
    VIEWS,
    Place,
)
from gapfx.capture.values import call_boxed

RANK: dict[ParameterRole, int] = {"unused": 0, "other": 1, "embedding": 2, "gemm": 3}


def find_uses(graph: fx.Graph, model: nn.Module) -> tuple[Use, ...]:
    """Every read of every parameter, in execution order of the consumers."""
    canonical, modules = canonical_fqns(model), dict(model.named_modules(remove_duplicate=False))
    order = {node: index for index, node in enumerate(graph.nodes)}
    active = active_nodes(graph)
    found: list[tuple[int, Use]] = []
    for node in graph.nodes:
        if node.op == "call_module":
            uses = _leaf_uses(node, modules[node.meta["fqn"]], canonical)
        elif node.meta.get("kind") == "parameter":
            uses = _read_uses(node, canonical, active)
        else:
            uses = _opaque_uses(node, canonical)
        found += [(order[consumer], use) for consumer, use in uses]
    unique = dict.fromkeys(sorted(found, key=lambda item: item[0]))
    return tuple(use for _, use in unique)


def canonical_fqns(model: nn.Module) -> dict[str, str]:
    """Every FQN of every parameter -> its canonical one."""
    first: dict[int, str] = {}
    named = list(model.named_parameters(remove_duplicate=False))
    return {fqn: first.setdefault(id(parameter), fqn) for fqn, parameter in named}


def parameter_facts(model: nn.Module, uses: tuple[Use, ...]) -> dict[str, Parameter]:
    """Facts of every parameter, in the order of `named_parameters()`."""
    aliases: defaultdict[str, list[str]] = defaultdict(list)
    for fqn, canonical in canonical_fqns(model).items():
        if fqn != canonical:
            aliases[canonical].append(fqn)
    roles: dict[str, ParameterRole] = {}
    for use in uses:
        roles[use.fqn] = max(roles.get(use.fqn, "unused"), use.role, key=RANK.__getitem__)
    return {
        fqn: Parameter(
            fqn=fqn,
            shape=tuple(parameter.shape),
            owner=fqn.rpartition(".")[0],
            aliases=tuple(aliases[fqn]),
            role=roles.get(fqn, "unused"),
        )
        for fqn, parameter in model.named_parameters()
    }


def active_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on the inputs of the model, through values or writes in place."""
    active: set[fx.Node] = set()
    names: set[str] = set()
    for node in graph.nodes:
        is_source = node.op == "placeholder" or node.meta.get("kind") == "constant"
        if (
            is_source
            or not active.isdisjoint(node.all_input_nodes)
            or not names.isdisjoint(node.meta.get("mem_deps", ()))
        ):
            active.add(node)
            names.add(node.name)
    return active


def _leaf_uses(node: fx.Node, module: nn.Module, canonical: Mapping[str, str]) -> Iterator[tuple[fx.Node, Use]]:
    prefix, fn = node.meta["fqn"], node.meta["fn"]
    for name, parameter in module.named_parameters(remove_duplicate=False):
        is_gemm = fn in GEMM_MODULES and parameter.ndim >= 2 and name not in ("bias_k", "bias_v")
        role: UseRole = "gemm" if is_gemm else "embedding" if fn in EMBEDDING else "other"
        fqn = canonical[f"{prefix}.{name}" if prefix else name]
        yield node, Use(fqn, node.name, prefix, fn, role)


def _opaque_uses(node: fx.Node, canonical: Mapping[str, str]) -> Iterator[tuple[fx.Node, Use]]:
    for fqn in node.meta.get("reads", ()):
        if fqn in canonical:
            yield node, Use(canonical[fqn], node.name, user_of(node), node.meta["fn"], "other")


def _read_uses(read: fx.Node, canonical: Mapping[str, str], active: set[fx.Node]) -> Iterator[tuple[fx.Node, Use]]:
    fqn, is_matrix = canonical[read.meta["fqn"]], len(read.meta["shape"]) >= 2
    todo, seen = [read], {read}
    while todo:
        node = todo.pop()
        for user in node.users:
            if is_template(node, user):
                continue
            if is_transparent(node, user, active):
                if user not in seen:
                    seen.add(user)
                    todo.append(user)
                continue
            role = consumer_role(node, user) if is_matrix else "other"
            yield user, Use(fqn, user.name, user_of(user), fn_of(user), role)


def is_template(node: fx.Node, user: fx.Node) -> bool:
    """Whether `user` takes the shape or dtype of `node` and none of its values."""
    fn, places = fn_of(user), argument_places(node, user)
    return (fn in LIKE_FIRST and places <= {0, "input"}) or (fn in LIKE_SECOND and places <= {1, "other"})


def is_transparent(node: fx.Node, user: fx.Node, active: set[fx.Node]) -> bool:
    """Whether `user` only moves, casts or scales the values of `node`: zeros stay zeros and nothing is mixed in."""
    fn, is_first = fn_of(user), argument_places(node, user) <= {0, "input", "v"}
    if fn in SELECTS:
        return is_first
    if any(other in active for other in user.all_input_nodes if other is not node):
        return False
    if fn in VIEWS or (fn in KEEPS_FIRST and is_first and fn not in ("div", "truediv")):
        return True
    return (fn in KEEPS_ZEROS or (fn in KEEPS_FIRST and is_first)) and _numel(node) == _numel(user)


def consumer_role(node: fx.Node, user: fx.Node) -> UseRole:
    """Role of a matrix parameter, seen as `node`, in its consumer."""
    fn, places = fn_of(user), argument_places(node, user)
    if user.op != "call_function":
        return "other"
    if fn in GEMM and places - GEMM[fn]:
        return "gemm"
    return "embedding" if fn in EMBEDDING and places & {1, "weight"} else "other"


def argument_places(node: fx.Node, user: fx.Node) -> set[Place]:
    """Positions and keywords at which `user` takes `node`."""
    args: tuple[Any, ...] = user.args[1:] if user.target is call_boxed else user.args
    places: dict[Place, Any] = {**dict(enumerate(args)), **user.kwargs}
    found: set[Place] = set()
    for place, value in places.items():
        fx.map_arg(value, lambda used, place=place: found.add(place) if used is node else None)
    return found


def fn_of(node: fx.Node) -> str:
    """Name of the op of a node; attribute reads are named after the attribute."""
    fn = node.meta.get("fn", node.op)
    return str(node.args[1]) if node.target is getattr else str(fn)


def user_of(node: fx.Node) -> str:
    """FQN of the innermost module that runs the node."""
    stack = node.meta.get("stack") or (("", 1),)
    return stack[-1][0]


def _numel(node: fx.Node) -> int:
    return math.prod(node.meta.get("shape", (0,)))
