"""What a case of the zoo is: a model that anybody can build, and inputs for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call of a model."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Case:
    """One architecture, random initialised and small, and inputs for it at two batch sizes.

    `family` is the architecture's own family: the module of timm, the model type of transformers.
    """

    library: str
    family: str
    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Inputs]
    batch_sizes: tuple[int, int] = (2, 3)

    @property
    def key(self) -> str:
        """`LIBRARY/NAME`, unique in the zoo."""
        return f"{self.library}/{self.name}"
