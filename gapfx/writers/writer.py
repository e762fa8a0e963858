"""What a writer is: a class that WRITERS finds by name, those of other packages included."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gapfx.registry import Registry
from gapfx.writers.points import Points


@dataclass(frozen=True)
class Opening:
    """The run that a writer is opened for.

    `folder` is the run directory, `settings` those of the run, `step` where it begins or goes on. `before` is what
    metrics.jsonl held when it went on, also what came after the checkpoint and will come again.
    """

    folder: Path
    settings: Mapping[str, Any]
    step: int = 0
    before: Sequence[Points] = field(default_factory=list[Points])


class Writer(ABC):
    """Shows points of one run; only rank 0 has one. What it raises ends it, and never the run.

    When a run goes on, points from the step `replay_from` on that are still true are written again. `told` are the last
    steps, by tag, up to which points have been written and are kept: they are not written a second time.
    """

    def __init__(self, opening: Opening) -> None:
        self.opening = opening
        self.replay_from = 0
        self.told: dict[str, int] = {}

    @classmethod  # noqa: B027  most writers need nothing
    def check(cls, *, is_new: bool) -> None:
        """Raise UserError for what is missing here, before anything is trained or written."""

    @abstractmethod
    def write(self, points: Points) -> None:
        """Take what one event says, at once: a crash shall lose none."""

    @abstractmethod
    def close(self, *, is_done: bool) -> None:
        """The last call; `is_done` when the run has come to its end."""


# Functions that give the class: only what is asked for is imported.
WRITERS: Registry[Callable[[], type[Writer]]] = Registry("writer")
