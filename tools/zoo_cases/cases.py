"""What a case of the zoo is: a model that anybody can build, and inputs for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

# Parts of the names of inputs, and the kind of model that takes them.
INPUT_KINDS = (
    (("input_ids",), "text"),
    (("pixel",), "vision"),
    (("input_features", "input_values", "audio"), "speech"),
    (("past_values",), "time series"),
)


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call of a model."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Case:
    """One architecture, random initialised and small, and inputs for it at two batch sizes.

    `family` is the architecture's own family: the module of timm, the model type of transformers. `kind` is what the
    table groups by ("CNN", "recurrent"); without it the names of the inputs say it. `seconds` is the time limit.
    """

    library: str
    family: str
    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Inputs]
    batch_sizes: tuple[int, int] = (2, 3)
    kind: str = ""
    seconds: float = 180

    @property
    def key(self) -> str:
        """`LIBRARY/NAME`, unique in the zoo."""
        return f"{self.library}/{self.name}"


def kind_of(case: Case, inputs: Inputs) -> str:
    """The kind of the case, or one by what goes in: "text", "vision", "speech", "multimodal" or the library."""
    found = {kind for name in inputs.kwargs for words, kind in INPUT_KINDS if any(word in name for word in words)}
    return case.kind or (found.pop() if len(found) == 1 else "multimodal" if found else case.library)
