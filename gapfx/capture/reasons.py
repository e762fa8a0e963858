"""Why a parameter of two or more dimensions is no weight of a matrix product, in words."""

from __future__ import annotations

from torch import fx

from gapfx.capture.flow import End, consumer_role
from gapfx.capture.nodes import argument_places, fn_of, inside_of
from gapfx.capture.opsets import GEMM, JOINS, NORMS, SCALES, SUMMANDS

MAX_STEPS = 200
MEANS = frozenset({"mean", "var_mean", "std_mean"})
STANDARDISED = (
    "standardised by {} before {}: its zeros do not stay zeros, and zeros made after that would not be in the"
    " state_dict; to make it sparse, put the standardised weight into a plain layer first"
)


def reason_of(end: End, active: set[fx.Node]) -> str:
    """What takes the parameter there, and what it is then."""
    if end.role != "other":
        return ""
    if inside_of(end.consumer) is not None:
        return f"read inside {fn_of(end.consumer)}, where no op that takes it can be seen"
    if end.consumer in active or fn_of(end.consumer) in GEMM or end.consumer.op != "call_function":
        return _direct(end.value, end.consumer)
    fn, last = fn_of(end.consumer), _next_active(end.consumer, active)
    if last is None:
        return f"taken by {fn}, and what that gives does not meet an activation"
    value, consumer = last
    if fn in NORMS and not argument_places(end.value, end.consumer) <= {0, "input"}:
        return f"the scale or bias of {fn}"
    if consumer_role(value, consumer) == "gemm":
        if _is_standardised(end.consumer):
            return STANDARDISED.format(fn, fn_of(consumer))
        return f"reaches {fn_of(consumer)} through {fn}, where its zeros do not stay zeros"
    return f"{_direct(value, consumer)}, after {fn}"


def _is_standardised(consumer: fx.Node) -> bool:
    """Whether a mean is subtracted: by a norm, or by hand."""
    if fn_of(consumer) in NORMS:
        return True
    sources = {fn_of(source) for node in consumer.all_input_nodes for source in (node, *node.all_input_nodes)}
    return fn_of(consumer) == "sub" and not sources.isdisjoint(MEANS)


def module_reason(fn: str, name: str) -> str:
    """For a parameter of a leaf module."""
    if fn == "multi_head_attention":
        return f"{name.removesuffix('s')} of {fn}: a learned token, no weight"
    return f"a scale or bias of {fn}, no weight of a product"


def _next_active(start: fx.Node, active: set[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """The product, else the first other op with an activation, that arithmetic on parameters alone leads to."""
    found: list[tuple[fx.Node, fx.Node]] = []
    todo, seen = [start], {start}
    while todo and len(seen) < MAX_STEPS:
        value = todo.pop()
        for user in value.users:
            if user in active or consumer_role(value, user) == "gemm":
                found.append((value, user))
            elif user not in seen:
                seen.add(user)
                todo.append(user)
    return next((pair for pair in found if consumer_role(*pair) == "gemm"), found[0] if found else None)


def _direct(value: fx.Node, user: fx.Node) -> str:
    fn = fn_of(user)
    if user.op == "output":
        return "returned by the model as it is: an output, no weight"
    if user.op == "call_module":
        return f"an input of the module {user.meta['fqn']} ({fn}): a token or a query, no weight"
    if fn in GEMM:
        return _beside_weight(value, user, fn)
    for names, text in MEANINGS:
        if fn in names:
            return text.format(fn)
    return f"taken by {fn}, which is no matrix product, convolution or lookup"


def _beside_weight(value: fx.Node, user: fx.Node, fn: str) -> str:
    places = argument_places(value, user)
    if places & {2, "bias"} or (fn.endswith(("addmm", "addbmm", "baddbmm", "addmv")) and places & {0, "input"}):
        return f"the bias of {fn}"
    return f"an activation of {fn}: a token or a query, no weight"


MEANINGS = (
    (SUMMANDS, "added to activations by {}: a position table or a bias"),
    (SCALES, "multiplied with activations element by element by {}: a scale"),
    (JOINS, "joined with activations by {}: a token or a table"),
    (NORMS, "the scale or bias of {}"),
    (frozenset({"scaled_dot_product_attention"}), "taken by {} beside activations: a query, a key, a value or a bias"),
)
