"""tie-weights: which weights serve in more than one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from gapfx.compiler import Analysis, Unit, register


@dataclass(frozen=True)
class Tie:
    """A weight with several FQNs, or one that is both looked up and multiplied.

    `aliases` are its other FQNs; `embedding` is the module that looks rows up in it ("the root" for the model itself),
    "" when none does.
    """

    fqn: str
    aliases: tuple[str, ...]
    embedding: str


@register
@dataclass(frozen=True)
class TieWeights(Analysis[Mapping[str, Tie]]):
    """FQN -> tie, for every weight that is tied."""

    name: ClassVar[str] = "tie-weights"

    def compute(self, unit: Unit) -> Mapping[str, Tie]:
        """Ties by FQN (the first name of the parameter), in the order of the parameters."""
        uses = reversed(unit.capture.uses)
        lookups = {use.fqn: use.user or "the root" for use in uses if use.role == "embedding"}
        modules = dict(unit.capture.model.named_modules(remove_duplicate=False))
        found: dict[str, Tie] = {}
        for parameter in unit.capture.parameters.values():
            homes = [fqn.rpartition(".")[0] for fqn in (parameter.fqn, *parameter.aliases)]
            tables = [home for home in homes if isinstance(modules[home], nn.Embedding)]
            embedding = lookups.get(parameter.fqn) or (tables[0] if tables else "")
            if parameter.aliases or (embedding and parameter.role == "gemm"):
                found[parameter.fqn] = Tie(parameter.fqn, parameter.aliases, embedding)
        return found
