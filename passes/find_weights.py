"""find-weights: which parameters can be sparse, and why the others stay dense."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from gapfx.capture import Capture, Parameter
from gapfx.compiler import Analysis, Unit, register
from gapfx.globs import matches, select
from gapfx.layers import execution_order
from gapfx.passes.tie_weights import Tie, TieWeights
from gapfx.plan import DenseWeight

MAX_REASONS = 2
EMBEDDING = ("embedding", "embedding_bag")


@dataclass(frozen=True)
class FoundWeight:
    """One prunable parameter; `fn` is the first product, convolution or lookup that takes it."""

    fqn: str
    shape: tuple[int, ...]
    role: Literal["gemm", "embedding"]
    fn: str
    aliases: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class FoundWeights:
    """Prunable weights in execution order, and every other parameter with the reason why it stays dense."""

    prunable: tuple[FoundWeight, ...]
    dense: tuple[DenseWeight, ...]


@register
@dataclass(frozen=True)
class FindWeights(Analysis[FoundWeights]):
    """Splits the parameters into prunable weights and dense ones.

    The defaults are the paper's: operands of matrix products and convolutions are prunable, embeddings and the
    projection onto a vocabulary are not. `dense` are globs to keep dense beside that, or the words `first` and
    `last`: the first and last prunable weight in execution order. `embeddings` makes tables and vocabulary
    projections prunable too; weights with fewer than `min_numel` elements stay dense.
    """

    name: ClassVar[str] = "find-weights"
    dense: tuple[str, ...] = ()
    embeddings: bool = False
    min_numel: int = 0

    def compute(self, unit: Unit) -> FoundWeights:
        """Raises UserError for a glob that matches no parameter."""
        capture, ties = unit.capture, unit.latest(TieWeights)
        # By name, not by attribute: a masked attribute gives the masked weight.
        tensors = dict(capture.model.named_parameters())
        modules = dict(capture.model.named_modules(remove_duplicate=False))
        others = _other_reasons(capture)
        reasons = {
            fqn: _fixed_reason(capture, item, tensors[fqn], others.get(fqn, ())) or _home_reason(modules, item)
            for fqn, item in capture.parameters.items()
        }
        if not self.embeddings:
            for fqn, reason in _embedding_reasons(capture, ties):
                reasons[fqn] = reasons[fqn] or reason
        order = execution_order(capture)
        for fqn, reason in self._chosen_dense(capture, [fqn for fqn in order if not reasons[fqn]]):
            reasons[fqn] = reasons[fqn] or reason
        dense = [DenseWeight(fqn, capture.parameters[fqn].shape, why) for fqn, why in reasons.items() if why]
        fns = {(use.fqn, use.role): use.fn for use in reversed(capture.uses)}
        prunable = [_found(capture.parameters[fqn], fns) for fqn in order if not reasons[fqn]]
        return FoundWeights(tuple(prunable), tuple(dense))

    def _chosen_dense(self, capture: Capture, prunable: list[str]) -> Iterator[tuple[str, str]]:
        """(weight, reason) for what the options keep dense."""
        ends = {"first": prunable[:1], "last": prunable[-1:]}
        names = [fqn for item in capture.parameters.values() for fqn in (item.fqn, *item.aliases)]
        for glob in self.dense:
            if glob not in ends:
                select(glob, names, option="dense of find-weights")
            yield from ((fqn, f"the {glob} prunable weight: option dense") for fqn in ends.get(glob, ()))
            for fqn in () if glob in ends else prunable:
                if any(matches(glob, alias) for alias in (fqn, *capture.parameters[fqn].aliases)):
                    yield fqn, f"option dense={glob}"
        for fqn in prunable:
            numel = math.prod(capture.parameters[fqn].shape)
            if numel < self.min_numel:
                yield fqn, f"{numel} elements: option min_numel={self.min_numel}"


def _found(parameter: Parameter, fns: Mapping[tuple[str, str], str]) -> FoundWeight:
    role = "gemm" if parameter.role == "gemm" else "embedding"
    return FoundWeight(parameter.fqn, parameter.shape, role, fns[parameter.fqn, role], parameter.aliases)


def _fixed_reason(capture: Capture, parameter: Parameter, tensor: nn.Parameter, others: Sequence[str]) -> str:
    """Why a parameter is no weight that trains; "" when it is. `others` are reasons of the uses."""
    if len(parameter.shape) < 2:
        return f"{len(parameter.shape)} dimension(s): a bias, a norm or a scale"
    if parameter.role == "unused":
        return "the recorded forward does not reach it"
    if _is_norm_magnitude(capture, parameter.fqn):
        return "the magnitude of a weight norm"
    if parameter.role == "other":
        return "; ".join(others) or "no operand of a matrix product, convolution or lookup"
    if not torch.is_floating_point(tensor):
        return f"values of type {str(tensor.dtype).removeprefix('torch.')}"
    if not tensor.requires_grad:
        return "it does not require a gradient"
    return ""


def _other_reasons(capture: Capture) -> Mapping[str, Sequence[str]]:
    """Why each use is none of a weight; where arithmetic leads to a product, its last step says it all."""
    found: dict[str, dict[str, None]] = {}
    for use in capture.uses:
        if use.reason:
            found.setdefault(use.fqn, {})[use.reason] = None
    through = {fqn: [reason for reason in reasons if reason.startswith("reaches ")] for fqn, reasons in found.items()}
    return {fqn: through[fqn][-1:] or list(reasons)[:MAX_REASONS] for fqn, reasons in found.items()}


def _is_norm_magnitude(capture: Capture, fqn: str) -> bool:
    pairs = (("_g", "_v"), (".original0", ".original1"))
    return any(fqn.endswith(g) and fqn.removesuffix(g) + v in capture.parameters for g, v in pairs)


def _home_reason(modules: Mapping[str, nn.Module], parameter: Parameter) -> str:
    for fqn in (parameter.fqn, *parameter.aliases):
        home = modules[fqn.rpartition(".")[0]]
        if not isinstance(vars(home)["_parameters"][fqn.rpartition(".")[2]], nn.Parameter):
            return "it is no parameter any more (a deep copy of a ScriptModule): an optimizer cannot train it"
        if isinstance(home, (nn.Embedding, nn.EmbeddingBag)) and home.max_norm is not None:
            return "its forward writes to it (max_norm)"
    return ""


def _embedding_reasons(capture: Capture, ties: Mapping[str, Tie]) -> Iterator[tuple[str, str]]:
    tables = {use.fqn: use.fn for use in capture.uses if use.role == "embedding"}
    for fqn, fn in tables.items():
        if capture.parameters[fqn].role == "embedding":
            yield fqn, "an embedding" if fn in EMBEDDING else f"a table: a product takes rows of it, chosen by {fn}"
    for tie in ties.values():
        if tie.embedding and tables.get(tie.fqn, "embedding") in EMBEDDING:
            yield tie.fqn, f"tied to the embedding {tie.embedding}"
        elif tie.embedding:
            yield tie.fqn, f"a table: {tie.embedding} also takes rows of it by {tables[tie.fqn]}"
    linears = [use.fqn for use in capture.uses if use.role == "gemm" and use.fn == "linear"]
    if linears:
        rows = capture.parameters[linears[-1]].shape[0]
        table = next((fqn for fqn in tables if capture.parameters[fqn].shape[0] == rows), None)
        if table:
            yield linears[-1], f"the output projection onto the {rows} entries of {table}"
