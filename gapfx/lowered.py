"""Where products of planned weights stand in the lowered graphs, and at which sizes they ran in the capture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from torch import fx

from gapfx.calibration import Case
from gapfx.calibration.cases import Dtype
from gapfx.capture import Capture
from gapfx.compiler import Unit
from gapfx.ops.convolution import convolution
from gapfx.ops.linear import linear
from gapfx.ops.sparse_convolution import sparse_convolution
from gapfx.ops.sparse_linear import sparse_linear
from gapfx.owners import holders
from gapfx.plan import Weight

# The op that makes the weight dense -> the one that skips zeros; they take the same arguments.
SPARSE: Mapping[Any, Any] = {linear: sparse_linear, convolution: sparse_convolution}
_CONVOLUTIONS = (convolution, sparse_convolution)
_PRODUCTS = (*SPARSE.keys(), *SPARSE.values())
NUM_STEPS_OF_SPARSITY = 50  # a case serves all weights of nearly its sparsity


def products(unit: Unit) -> Iterator[tuple[str, fx.Node]]:
    """(weight, the node that multiplies or convolves with its live values), in every module that holds the weight."""
    for fqn, path, name in holders(unit.capture):
        owner = unit.owners.get(path)
        for node in owner.graph.graph.nodes if owner and name in owner.names else ():
            if node.op == "call_function" and node.target in _PRODUCTS and node.args[1].target == name:
                yield fqn, node


def sparse_weights(unit: Unit) -> frozenset[str]:
    """Weights with a product that skips zeros."""
    return frozenset(fqn for fqn, node in products(unit) if node.target in tuple(SPARSE.values()))


def cases_of(unit: Unit, weights: Iterable[Weight], dtype: Dtype) -> dict[str, tuple[Case, ...]]:
    """Weight -> one case for each time that the captured forward used it; none for weights without such a product."""
    nodes = dict(products(unit))
    sizes = _sizes(unit.capture)
    found: dict[str, tuple[Case, ...]] = {}
    for weight in weights:
        node = nodes.get(weight.fqn)
        if node is None:
            continue
        settings = tuple(cast(Sequence[int], node.args[-1])) if node.target in _CONVOLUTIONS else ()
        sparsity = round(weight.sparsity * NUM_STEPS_OF_SPARSITY) / NUM_STEPS_OF_SPARSITY
        places = [_places(shape, weight.shape, bool(settings)) for shape in sizes.get(weight.fqn, ())]
        # An expert that was sent nothing has a product without rows, which takes no time to compare.
        used = [place for place in places if place and math.prod(place)]
        if used:
            found[weight.fqn] = tuple(Case(weight.shape, p, sparsity, weight.pattern, settings, dtype) for p in used)
    return found


def _sizes(capture: Capture) -> dict[str, list[tuple[int, ...]]]:
    """Weight -> shapes of what its products gave, where the capture shows them."""
    shapes: dict[str, Any] = {node.name: node.meta.get("shape") for node in capture.graph_module.graph.nodes}
    found: dict[str, list[tuple[int, ...]]] = {}
    for use in capture.uses:
        if use.role == "gemm" and shapes.get(use.node) is not None:
            found.setdefault(use.fqn, []).append(tuple(shapes[use.node]))
    return found


def _places(output: tuple[int, ...], shape: tuple[int, ...], is_convolution: bool) -> tuple[int, ...]:
    """The output's sizes without its channels; () for an output that is not that of this product."""
    if not is_convolution:
        return (math.prod(output[:-1]),) if output and output[-1] == shape[0] else ()
    batched = output if len(output) == len(shape) else (1, *output)
    is_its_own = len(batched) == len(shape) and batched[1] == shape[0]
    return (batched[0], *batched[2:]) if is_its_own else ()
