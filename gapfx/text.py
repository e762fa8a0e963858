"""Plain text for graphs and plans: the same graph or plan gives the same text in every run."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx

from gapfx.capture.values import call_boxed
from gapfx.pattern import parse_pattern
from gapfx.plan import DenseWeight, OwnerForm, Phase, Plan, Weight

MAX_NAMES = 4


def format_graph(gm: fx.GraphModule) -> str:
    """One line a node: `name  op target(args)  [shape]  scope`; free of addresses and of what other lines contain."""
    return "\n".join(_node_line(node) for node in gm.graph.nodes) + "\n"


def format_diff(before: str | fx.GraphModule, after: str | fx.GraphModule) -> str:
    """Unified diff of two graphs or of their texts; empty when they are equal."""
    texts = [graph if isinstance(graph, str) else format_graph(graph) for graph in (before, after)]
    old, new = (text.splitlines() for text in texts)
    lines = difflib.unified_diff(old, new, fromfile="before", tofile="after", n=2, lineterm="")
    return "".join(f"{line}\n" for line in lines)


def format_plan(plan: Plan) -> str:
    """The groups with their sizes and exact kept counts, then what stays dense and why."""
    title = (
        f"method {plan.method}, sparsity {_share(plan.sparsity)}, partition {plan.partition}, "
        f"allocation {plan.allocation}, criterion {plan.criterion}, start masks {plan.start_masks}"
    )
    rows = [_group_row(str(index), group.name, group.weights) for index, group in enumerate(plan.groups)]
    rows.append(_group_row("", "all", tuple(plan.weights())))
    groups = table_text(
        ["group", "name", "weights", "numel", "sparsity", "kept", "patterns"], rows, right={0, 2, 3, 4, 5}
    )
    parts = [
        f"{title}\n{_shared_text(plan)}",
        groups,
        _dense_text(plan.dense),
        *[_owners_text(plan.owners)] * bool(plan.owners),
    ]
    return "\n".join(parts)


def format_phases(plan: Plan) -> str:
    """The phase table. `kept` is the share of the planned weights that is live while the phase trains."""
    header = ["phase", "name", "round", "steps", "grow", "prune at end", "state", "lr", "kept"]
    rows = [_phase_row(plan, index, phase, kept) for (index, phase), kept in _with_kept(plan)]
    return table_text(header, rows, right={0, 2, 8})


def format_kernels(plan: Plan) -> str:
    """How the products of frozen weights run, and the speed-up over dense layers; "" where nothing is to be told."""
    classes: dict[tuple[str, ...], int] = {}
    for weight in plan.weights():
        row = _kernel_row(weight)
        classes[row] = classes.get(row, 0) + 1
    if not any(weight.positions or weight.kernel == "sparse" for weight in plan.weights()):
        return ""
    header = ["kernel", "weights", "shape", "sparsity", "pattern", "positions", "gain"]
    return table_text(header, [[row[0], str(number), *row[1:]] for row, number in classes.items()], right={1, 3, 5, 6})


# ---- graphs


def _node_line(node: fx.Node) -> str:
    args = ", ".join([*map(_value, _shown_args(node)), *(f"{key}={_value(arg)}" for key, arg in node.kwargs.items())])
    call = args if node.op == "output" else "" if node.op == "placeholder" else f"{_target(node)}({args})"
    if node.op == "get_attr":
        call = str(node.target)
    what = f"{node.op} {call}".rstrip()
    parts = [f"{node.name:<28}", f"{what:<60}", f"{_shape(node):<18}", _scope(node)]
    return "  ".join(parts).rstrip()


def _shown_args(node: fx.Node) -> tuple[Any, ...]:
    return node.args[1:] if node.target is call_boxed else node.args


def _target(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    if node.target is call_boxed:
        return str(node.meta.get("fn", "call"))
    return _function(node.target)


def _function(function: Any) -> str:
    """`torch.relu` as relu, `torch.ops.gapfx.mask` as gapfx.mask: the private home of a function may move."""
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):  # pyright: ignore[reportPrivateUsage]
        return str(function)
    return str(getattr(function, "__name__", type(function).__name__))


def _value(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value).items()
        return "{" + ", ".join(f"{key}: {_value(item)}" for key, item in items) + "}"
    if isinstance(value, slice):
        parts = (value.start, value.stop) if value.step is None else (value.start, value.stop, value.step)
        return ":".join("" if part is None else _value(part) for part in parts)
    if isinstance(value, (tuple, list)):
        items = ", ".join(map(_value, cast(Sequence[Any], value)))
        return f"[{items}]" if isinstance(value, list) else f"({items})"
    if callable(value):
        return _function(value)
    text = repr(value)
    return f"<{type(value).__name__}>" if " at 0x" in text else text.removeprefix("torch.")


def _shape(node: fx.Node) -> str:
    shape = node.meta.get("shape")
    if shape is None:
        shape = getattr(node.meta.get("tensor_meta"), "shape", None)
    return "" if shape is None else str(list(shape))


def _scope(node: fx.Node) -> str:
    """Module that runs the node, and the number of its call from the second on."""
    stack = node.meta.get("stack")
    if not stack or node.op == "output":
        return ""
    caller = stack[-2] if node.op == "call_module" and len(stack) > 1 else stack[-1]
    return " ".join([f"in {caller[0]}"] * bool(caller[0]) + [f"call {stack[-1][1]}"] * (stack[-1][1] > 1))


# ---- plans


def num_kept(weights: Iterable[Weight]) -> int:
    """Weights that the masks of `weights` keep at their target sparsity."""
    return sum(parse_pattern(weight.pattern).num_kept(weight.shape, weight.sparsity) for weight in weights)


def _shared_text(plan: Plan) -> str:
    """For a plan with one threshold a group: how many weights it is over, and how many keep a count of their own."""
    if plan.allocation != "global":
        return ""
    pools = [pool for group in plan.groups for pool in plan.pools(group)]
    shared, alone = (sum(len(pool) for pool in pools if (len(pool) > 1) is many) for many in (True, False))
    told = f"each prune has one threshold a group, over {shared} weights in all"
    reason = "which have a pattern, a sparsity by hand or a group to themselves"
    return told + (f"; {alone} keep their own counts, {reason}" if alone else "") + "\n"


def _group_row(index: str, name: str, weights: Sequence[Weight]) -> list[str]:
    numel, kept = sum(weight.numel for weight in weights), num_kept(weights)
    patterns = ", ".join(dict.fromkeys(weight.pattern for weight in weights))
    return [
        index,
        name,
        str(len(weights)),
        f"{numel:,}",
        _share(1 - kept / numel if numel else 0),
        f"{kept:,}",
        patterns,
    ]


def _kernel_row(weight: Weight) -> tuple[str, ...]:
    known = bool(weight.positions)
    return (
        weight.kernel,
        "x".join(map(str, weight.shape)),
        _share(weight.sparsity),
        weight.pattern,
        f"{weight.positions:,}" if known else "-",
        f"{weight.gain:.2f}x" if known else "-",
    )


def _dense_text(dense: Sequence[DenseWeight]) -> str:
    if not dense:
        return "no other parameter of two or more dimensions stays dense\n"
    reasons: dict[str, list[DenseWeight]] = {}
    for weight in dense:
        reasons.setdefault(weight.reason, []).append(weight)
    rows = [
        [
            reason,
            str(len(weights)),
            f"{sum(math.prod(weight.shape) for weight in weights):,}",
            _names([w.fqn for w in weights]),
        ]
        for reason, weights in reasons.items()
    ]
    return table_text(["stays dense because", "weights", "numel", "which"], rows, right={1, 2})


def _owners_text(owners: Sequence[OwnerForm]) -> str:
    """One row for each form of each class, with the first of its reasons."""
    kinds: dict[tuple[str, str], list[OwnerForm]] = {}
    for owner in owners:
        kinds.setdefault((owner.kind, owner.form), []).append(owner)
    rows = [[form, str(len(alike)), kind, _reasons(alike)] for (kind, form), alike in kinds.items()]
    return table_text(["masked in form", "owners", "class", "because"], rows, right={1})


def _reasons(owners: Sequence[OwnerForm]) -> str:
    reasons = list(dict.fromkeys(owner.reason for owner in owners))
    return reasons[0] + (f"; {len(reasons) - 1} more reasons" if len(reasons) > 1 else "")


def _with_kept(plan: Plan) -> Iterator[tuple[tuple[int, Phase], float]]:
    """Each phase with the kept share of all planned weights while it trains; before the first all are sparse.

    Of replicas, that which keeps most.
    """
    sizes = [group.numel for group in plan.groups]
    dense: set[int] = set()
    for index, phase in enumerate(plan.phases):
        sparse = [num_kept(group.weights) for group in plan.eased(index - 1).groups]
        replicas = [dense | set(phase.grown_by(replica)) for replica in range(phase.replicas)]
        kept = max(sum(sizes[g] if g in grown else sparse[g] for g in range(len(sizes))) for grown in replicas)
        yield (index, phase), kept / max(1, sum(sizes))
        dense = (dense | set(phase.grow)) - set(phase.prune)


def _phase_row(plan: Plan, index: int, phase: Phase, kept: float) -> list[str]:
    steps = f"[{phase.start:,}, {phase.stop:,})"
    grow, prune = (_groups(plan, groups) for groups in (phase.grow, phase.prune))
    prune += f" to {phase.depth:.1%} of target" if phase.depth < 1 else ""
    if phase.drop:
        grow = f"{'' if grow == '-' else f'{grow}, '}{phase.drop:.1%} dropped, regrown: {phase.regrow}"
    grow += ", to saved values" * (phase.growth == "saved") + ", kept aside at the end" * phase.keep
    grow = "all weights rewound" if phase.rewind else grow
    grow += {"no": "", "ramp": ", softened ever more", "hold": ", softened"}[phase.soften]
    return [str(index), phase.name, str(phase.round), steps, grow, prune, phase.state, _lr(phase), _share(kept)]


def _lr(phase: Phase) -> str:
    is_part = phase.lr == "restart" and phase.lr_steps
    return phase.lr + (f" at {phase.lr_skip:,} of {phase.lr_steps:,}" if is_part else "")


def _groups(plan: Plan, groups: Sequence[int]) -> str:
    if len(groups) > 1 and len(set(groups)) == len(plan.groups):
        return "all"
    return _names([plan.groups[group].name for group in groups]) or "-"


def _names(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f", {more} more" if more > 0 else "")


def _share(share: float) -> str:
    return f"{share:.1%}"


def table_text(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: set[int]) -> str:
    """Columns side by side, those of `right` flush right, a line each, the header first."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    cells = [
        [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    return "".join("  ".join(line).rstrip() + "\n" for line in cells)
