"""Where the values of one parameter go: to a product, a convolution, a lookup, or something that is none of these."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import fx

from gapfx.capture.facts import UseRole
from gapfx.capture.lookups import is_lookup
from gapfx.capture.nodes import argument_places, fn_of, host_of, inside_of, num_elements
from gapfx.capture.opsets import (
    CASTS,
    EMBEDDING,
    GEMM,
    HAS_WEIGHT_PLACE,
    KEEPS_COMMON,
    KEEPS_FIRST,
    KEEPS_ZEROS,
    LIKE_FIRST,
    LIKE_SECOND,
    SCALES,
    SELECTS,
    STORES,
    VIEWS,
)

# What the values are by now: the parameter's own, such rows of it as an index asks for, or its product with an
# activation. The last two count where a convolution or linear takes them as its weight.
Way = Literal["own", "looked up", "scaled"]


@dataclass(frozen=True)
class End:
    """A consumer of a parameter, which it takes as `value`."""

    consumer: fx.Node
    value: fx.Node
    role: UseRole


@dataclass
class Flow:
    """The graph as the values of a parameter see it: order of execution, and what depends on the model's inputs."""

    order: Mapping[fx.Node, int]
    active: set[fx.Node]

    def ends(self, read: fx.Node) -> Iterator[End]:
        """The consumers of a read, behind views and what keeps zeros where they are."""
        is_matrix = len(read.meta.get("shape", ())) >= 2
        walk, found = _Walk(self), list[tuple[End, Way]]()
        walk.arrive(read, "own", is_aligned=True)
        for user, value, way in walk.steps():
            if is_template(value, user) or walk.enter(user, value, way):
                continue
            if way == "scaled":
                if not walk.scale(user, value) and _is_weight(value, user):
                    found.append((End(user, value, "gemm"), way))
                continue
            if walk.keep(user, value, way):
                continue
            found.append((End(user, value, consumer_role(value, user) if is_matrix else "other"), way))
            if is_matrix and fn_of(user) in SCALES:
                walk.scale(user, value)
        yield from _without_tables(found, walk.lookups)
        for last in walk.dead_ends:
            yield End(host_of(last), last, "other")


@dataclass
class _Walk:
    """One parameter's way: (consumer, value) pairs still to judge, in the order of execution.

    Aligned values have the parameter's elements in its own order, zero where the parameter is. `lookups` are the
    nodes that take rows of it by an index, with the value that they take.
    """

    flow: Flow
    _todo: list[tuple[int, int, fx.Node, fx.Node, Way]] = field(
        default_factory=list[tuple[int, int, fx.Node, fx.Node, Way]]
    )
    _aligned: set[fx.Node] = field(default_factory=set[fx.Node])
    dead_ends: list[fx.Node] = field(default_factory=list[fx.Node])
    lookups: list[tuple[fx.Node, fx.Node]] = field(default_factory=list[tuple[fx.Node, fx.Node]])
    _seen: set[tuple[fx.Node, Way]] = field(default_factory=set[tuple[fx.Node, Way]])

    def steps(self) -> Iterator[tuple[fx.Node, fx.Node, Way]]:
        """(consumer, value, what it is by now), until nothing is left."""
        while self._todo:
            _, _, user, value, way = heapq.heappop(self._todo)
            yield user, value, way

    def arrive(self, node: fx.Node, way: Way, *, is_aligned: bool) -> None:
        """The values are at a node: judge its consumers, and those behind the call that gives it as a result."""
        if (node, way) in self._seen:
            return
        self._seen.add((node, way))
        if is_aligned:
            self._aligned.add(node)
        for user in node.users:
            heapq.heappush(self._todo, (self.flow.order[user], len(self._seen), user, node, way))
        inside = inside_of(host_of(node)) if host_of(node) is not node else None
        exits = inside.exits.get(node, ()) if inside else ()
        for outer in exits:
            self.arrive(outer, way, is_aligned=is_aligned)
        if inside and not exits and not node.users and way != "scaled":  # numpy or a kernel of its own takes it there
            self.dead_ends.append(node)

    def enter(self, user: fx.Node, value: fx.Node, way: Way) -> bool:
        """Follow the values into an opaque call; False when nothing is seen of them there."""
        inside = inside_of(user)
        entry = inside.entries.get(value) if inside else None
        if entry is None:
            return False
        self.arrive(entry, way, is_aligned=value in self._aligned)
        return True

    def keep(self, user: fx.Node, value: fx.Node, way: Way) -> bool:
        """Follow the values through an op that only moves, casts or scales them; False where it does more."""
        is_sum = fn_of(user) in KEEPS_COMMON and self._aligned.issuperset(user.all_input_nodes)
        if not is_sum and not is_transparent(value, user, self.flow.active):
            return False
        stays = fn_of(user) not in VIEWS or fn_of(user) in CASTS
        if is_lookup(value, user, self.flow.active):
            self.lookups.append((user, value))
            way = "looked up"
        self.arrive(user, way, is_aligned=stays and value in self._aligned)
        return True

    def scale(self, user: fx.Node, value: fx.Node) -> bool:
        """Follow scaled values through what a weight that depends on the input goes through."""
        fn = fn_of(user)
        if fn not in SCALES and fn not in VIEWS and fn != "sum":
            return False
        self.arrive(user, "scaled", is_aligned=False)
        return True


def _without_tables(found: list[tuple[End, Way]], lookups: list[tuple[fx.Node, fx.Node]]) -> Iterator[End]:
    """The ends; the lookups in place of the products that take the rows of a table.

    A parameter that is looked up is a table when a product takes it or its rows, such as a codebook and its distances,
    unless the rows are the weight of a convolution or linear.
    """
    rows = {end for end, way in found if way == "looked up" and end.role == "gemm"}
    is_weight = any(_is_weight(end.value, end.consumer) for end, way in found if way != "own" and end.role == "gemm")
    is_table = bool(lookups) and not is_weight and any(end.role == "gemm" for end, _ in found)
    yield from (end for end, _ in found if not (is_table and end in rows))
    if is_table:
        yield from (End(node, value, "embedding") for node, value in lookups)


def is_template(node: fx.Node, user: fx.Node) -> bool:
    """Whether `user` takes the shape or dtype of `node` and none of its values, or keeps it for later."""
    fn = fn_of(user)
    if fn in STORES:
        return True
    if fn in LIKE_FIRST:
        return argument_places(node, user) <= {0, "input"}
    return fn in LIKE_SECOND and argument_places(node, user) <= {1, "other"}


def is_transparent(node: fx.Node, user: fx.Node, active: set[fx.Node]) -> bool:
    """Whether `user` only moves, casts or scales the values of `node`: zeros stay zeros and nothing is mixed in."""
    fn, is_first = fn_of(user), argument_places(node, user) <= {0, "input", "v"}
    if fn in SELECTS or (fn in LIKE_SECOND and is_first):
        return is_first
    if any(other in active for other in user.all_input_nodes if other is not node):
        return False
    if fn in VIEWS or (fn in KEEPS_FIRST and is_first and fn not in SCALES):
        return True
    keeps = fn in KEEPS_ZEROS or (fn in KEEPS_FIRST and is_first) or _is_clamp_around_zero(user)
    return keeps and num_elements(node) == num_elements(user)


def consumer_role(node: fx.Node, user: fx.Node) -> UseRole:
    """Role of a matrix parameter, seen as `node`, in its consumer."""
    fn = fn_of(user)
    if user.op != "call_function":
        return "other"
    if fn in GEMM and argument_places(node, user) - GEMM[fn]:
        return "gemm"
    return "embedding" if fn in EMBEDDING else "other"


def _is_weight(node: fx.Node, user: fx.Node) -> bool:
    return fn_of(user) in HAS_WEIGHT_PLACE and consumer_role(node, user) == "gemm"


def _is_clamp_around_zero(user: fx.Node) -> bool:
    if fn_of(user) not in ("clamp", "clip"):
        return False
    low, high = (*user.args[1:], None, None)[:2]
    low, high = user.kwargs.get("min", low), user.kwargs.get("max", high)
    is_low = low is None or (isinstance(low, (int, float)) and low <= 0)
    return is_low and (high is None or (isinstance(high, (int, float)) and high >= 0))
