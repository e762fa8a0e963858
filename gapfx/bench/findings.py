"""What a bench found, as plain data."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

What = Literal["forward", "step"]
DENSE = "dense"


@dataclass(frozen=True)
class Timing:
    """Median seconds of one way to run something, or why it was not timed (`seconds` is 0 then).

    `what`: a forward without gradients, or a training step (of a layer: forward and backward; of a model: the optimizer
    too). `subject` is a class of layers or "the model". `batch` is known of the model of a run, `kernel` where a kernel
    for sparse weights serves.
    """

    subject: str
    what: What
    way: str
    threads: int
    positions: int
    seconds: float = 0.0
    reason: str = ""
    batch: int = 0
    kernel: str = ""


@dataclass(frozen=True)
class Findings:
    """All timings; `sparsity` is the target of the plan, `num_groups` how many groups grow in turn."""

    device: str
    dtype: str
    sparsity: float
    pattern: str
    num_groups: int
    timings: tuple[Timing, ...]
    notes: tuple[str, ...] = ()

    def gain(self, timing: Timing) -> float | None:
        """Speed-up over the dense way in torch of the same subject and size; None where one of the two is missing."""
        wanted = _key(dataclasses.replace(timing, way=DENSE))
        dense = next((other for other in self.timings if _key(other) == wanted), None)
        return dense.seconds / timing.seconds if dense and dense.seconds and timing.seconds else None

    def to_json(self) -> str:
        """All numbers, each timing with its `gain` over dense torch."""
        timings = [{**dataclasses.asdict(timing), "gain": self.gain(timing)} for timing in self.timings]
        return json.dumps({**dataclasses.asdict(self), "timings": timings}, indent=1)


def _key(timing: Timing) -> tuple[object, ...]:
    """What two timings of the same thing share. Two batches may give a weight the same number of positions."""
    return timing.subject, timing.what, timing.way, timing.threads, timing.positions, timing.batch
