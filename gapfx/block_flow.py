"""How data flow between the weights of one block: the parts of an attention, and products that feed each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import fx

from gapfx.capture import Capture
from gapfx.capture.nodes import active_nodes, argument_places, fn_of, num_elements, user_of

PRODUCTS = frozenset({"matmul", "bmm", "einsum", "baddbmm", "rmatmul"})
LINEAR = frozenset({*PRODUCTS, "linear", "addmm", "mm", "addbmm", "grouped_mm"})
FUSED = "scaled_dot_product_attention"
PARTS = {0: "q", 1: "k", 2: "v", "query": "q", "key": "k", "value": "v"}
SUMS = frozenset({"add", "iadd", "radd"})
# Where a router's choice becomes places of rows: the numbers themselves do not flow on.
ROWS = frozenset({"getitem", "index_select", "gather", "take_along_dim"})
INDICES = frozenset({"sort", "argsort", "one_hot", "histc", "bincount", "nonzero"})

Way = Callable[[fx.Node], Sequence[fx.Node]]


def up(node: fx.Node) -> Sequence[fx.Node]:
    """What a node takes."""
    return node.all_input_nodes


def down(node: fx.Node) -> Sequence[fx.Node]:
    """What takes a node as more than places of rows."""
    return [user for user in node.users if fn_of(user) not in ROWS or 0 in argument_places(node, user)]


@dataclass(frozen=True)
class BlockFlow:
    """The recorded graph seen from the weights of blocks; `block_of` has the module that is the block of each weight.

    Nodes outside of the module of a block are never walked, so that a question costs as much as its block is long.
    """

    capture: Capture
    block_of: Mapping[str, str]
    _weights_at: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    _fns: dict[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        for use in self.capture.uses:
            if use.role == "gemm":
                self._weights_at.setdefault(use.node, []).append(use.fqn)
                self._fns.setdefault(use.fqn, use.fn)

    def attention(self) -> dict[str, str]:
        """Weight -> "q", "k", "v" (or several of them) for what it makes, or "o" for what takes the result."""
        letters: dict[str, set[str]] = {}
        outputs: set[str] = set()
        for output, operands in self._attentions():
            block = self._block_at(output)
            for letter, node in operands:
                for fqn in self._nearest([node], up, block):
                    letters.setdefault(fqn, set()).add(letter)
            outputs.update(self._nearest(down(output), down, block))
        found = {fqn: "".join(letter for letter in "qkv" if letter in own) for fqn, own in letters.items()}
        return {fqn: "o" for fqn in outputs if fqn not in found} | found

    def feeds(self, fqn: str) -> set[str]:
        """The next weights of the block that the product with a weight goes to, not past a sum or as indices."""
        return self._nearest(
            [user for node in self._nodes.get(fqn, ()) for user in node.users], down, self.block_of[fqn]
        )

    def is_linear(self, fqn: str) -> bool:
        """Whether a weight is used in a matrix product, not in a convolution."""
        return self._fns.get(fqn, "").strip("_") in LINEAR

    def widens(self, fqn: str) -> bool:
        """Whether the product with a weight is at least as large as what the weight is multiplied with."""
        return all(num_elements(node) >= self._taken(node) for node in self._nodes[fqn])

    def _taken(self, node: fx.Node) -> int:
        """Elements of what a weight is multiplied with; rows of a weight that the data choose do not count."""
        values = self._active.intersection(up(node))
        return max(
            (num_elements(value) for value in values if not up(value) or up(value)[0] in self._active), default=0
        )

    @cached_property
    def _active(self) -> set[fx.Node]:
        return active_nodes(self.capture.graph_module.graph)

    @cached_property
    def _blocks(self) -> frozenset[str]:
        return frozenset(self.block_of.values())

    @cached_property
    def _nodes(self) -> dict[str, list[fx.Node]]:
        found: dict[str, list[fx.Node]] = {}
        for node in self.capture.graph_module.graph.nodes:
            for fqn in self._weights_at.get(node.name, ()):
                found.setdefault(fqn, []).append(node)
        return found

    def _attentions(self) -> Iterator[tuple[fx.Node, list[tuple[str, fx.Node]]]]:
        """(the node that weighs the values, (letter, operand) of what it is made of)."""
        for node in self.capture.graph_module.graph.nodes:
            if fn_of(node) == FUSED:
                yield (
                    node,
                    [(PARTS[place], value) for value in up(node) for place in argument_places(value, node) & {*PARTS}],
                )
            elif fn_of(node) == "softmax":
                scores, output = self._product(node, up), self._product(node, down)
                if scores is not None and output is not None:
                    values = [
                        value for value in up(output) if node not in self._walk([value], up, self._block_at(node))
                    ]
                    pairs = zip("qk", up(scores)[-2:], strict=False)
                    yield output, [*pairs, *(("v", value) for value in values[-1:])]

    def _product(self, start: fx.Node, way: Way) -> fx.Node | None:
        """The nearest product of two values that are no weights."""
        walk = self._walk(way(start), way, self._block_at(start))
        return next((node for node in walk if fn_of(node).strip("_") in PRODUCTS and len(up(node)) >= 2), None)

    def _block_at(self, node: fx.Node) -> str:
        """The innermost block in which a node runs."""
        parts = user_of(node).split(".")
        names = (".".join(parts[:depth]) for depth in range(len(parts), 0, -1))
        return next((name for name in names if name in self._blocks), "")

    def _nearest(self, starts: Sequence[fx.Node], way: Way, block: str) -> set[str]:
        """The first weights of the block that a way leads to."""
        ends: list[fx.Node] = []
        for _ in self._walk(starts, way, block, ends):
            pass
        return {fqn for node in ends for fqn in self._weights_at[node.name] if self.block_of.get(fqn) == block}

    def _walk(
        self, starts: Sequence[fx.Node], way: Way, block: str, ends: list[fx.Node] | None = None
    ) -> Iterator[fx.Node]:
        """Nodes in the block by their distance, up to products with weights, which go to `ends`."""
        todo, seen = list(starts), set[fx.Node]()
        for node in todo:
            if node in seen or not f"{user_of(node)}.".startswith(f"{block}.") or (way is down and self._is_end(node)):
                continue
            seen.add(node)
            if node.name in self._weights_at:
                ends = [] if ends is None else ends
                ends.append(node)
            else:
                yield node
                todo += way(node)

    def _is_end(self, node: fx.Node) -> bool:
        """Whether a way down ends here: at a sum of two values, and at indices."""
        fn = fn_of(node).strip("_")
        return fn in INDICES or (fn in SUMS and len(self._active.intersection(up(node))) > 1)
