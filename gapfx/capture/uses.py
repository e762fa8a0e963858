"""Reads of parameters in a recorded graph, each with the role of its first consumer that is not a view."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from torch import fx, nn

from gapfx.capture.facts import Parameter, ParameterRole, Use, UseRole
from gapfx.capture.flow import Flow
from gapfx.capture.nodes import active_nodes, fn_of, host_of, inside_of, numbered, user_of
from gapfx.capture.opsets import EMBEDDING, GEMM_MODULES
from gapfx.capture.reasons import module_reason, reason_of

RANK: dict[ParameterRole, int] = {"unused": 0, "other": 1, "embedding": 2, "gemm": 3}


def find_uses(graph: fx.Graph, model: nn.Module) -> tuple[Use, ...]:
    """Every read of every parameter, in execution order of the consumers."""
    canonical, modules = canonical_fqns(model), dict(model.named_modules(remove_duplicate=False))
    flow = Flow(dict(numbered(graph)), active_nodes(graph))
    found: list[tuple[int, Use]] = []
    for node in graph.nodes:
        inside = inside_of(node)
        reads = [node] if inside is None else list(inside.graph.nodes)
        for read in reads:
            if read.meta.get("kind") == "parameter":
                found += _read_uses(read, canonical, flow)
        if inside is not None:
            found += _opaque_uses(node, canonical, flow)
        elif node.op == "call_module":
            found += _leaf_uses(node, modules[node.meta["fqn"]], canonical, flow)
    unique = dict.fromkeys(sorted(found, key=lambda item: item[0]))
    return tuple(dict.fromkeys(use for _, use in unique))


def canonical_fqns(model: nn.Module) -> dict[str, str]:
    """Every FQN of every parameter -> its canonical one."""
    first: dict[int, str] = {}
    named = list(model.named_parameters(remove_duplicate=False))
    return {fqn: first.setdefault(id(parameter), fqn) for fqn, parameter in named}


def parameter_facts(model: nn.Module, uses: Iterable[Use]) -> dict[str, Parameter]:
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


def _leaf_uses(node: fx.Node, module: nn.Module, canonical: Mapping[str, str], flow: Flow) -> Iterator[tuple[int, Use]]:
    prefix, fn = node.meta["fqn"], node.meta["fn"]
    for name, parameter in module.named_parameters(remove_duplicate=False):
        is_gemm = fn in GEMM_MODULES and parameter.ndim >= 2 and name not in ("bias_k", "bias_v")
        role: UseRole = "gemm" if is_gemm else "embedding" if fn in EMBEDDING else "other"
        reason = module_reason(fn, name) if role == "other" and parameter.ndim >= 2 else ""
        fqn = canonical[f"{prefix}.{name}" if prefix else name]
        yield flow.order[node], Use(fqn, node.name, prefix, fn, role, reason)


def _opaque_uses(node: fx.Node, canonical: Mapping[str, str], flow: Flow) -> Iterator[tuple[int, Use]]:
    """Reads by torch functions of which no op was seen: code that leaves torch, such as `.numpy()`."""
    inside = inside_of(node)
    seen = {read.meta.get("fqn") for read in inside.graph.nodes} if inside else set[str]()
    for fqn in node.meta.get("reads", ()):
        if fqn in canonical and fqn not in seen and fqn not in {item.meta.get("fqn") for item in node.all_input_nodes}:
            reason = f"read inside {node.meta['fn']}, where no op that takes it can be seen"
            yield flow.order[node], Use(canonical[fqn], node.name, user_of(node), node.meta["fn"], "other", reason)


def _read_uses(read: fx.Node, canonical: Mapping[str, str], flow: Flow) -> Iterator[tuple[int, Use]]:
    fqn, is_matrix = canonical[read.meta["fqn"]], len(read.meta["shape"]) >= 2
    for end in flow.ends(read):
        user, host = end.consumer, host_of(end.consumer)
        reason = reason_of(end, flow.active) if is_matrix else ""
        yield flow.order[user], Use(fqn, host.name, user_of(user), fn_of(user), end.role, reason)
