"""What somebody else adds: a method, a criterion, a pattern, a pass and a format of task files.

The entry point in pyproject.toml names this module.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from einops import reduce, repeat
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from gapfx.compiler import Analysis, Unit, register
from gapfx.criterion import CRITERIA
from gapfx.errors import TaskError, UserError
from gapfx.passes.partition import Partition
from gapfx.pattern import PATTERNS, kept_count, top_mask
from gapfx.schedule import SCHEDULES, Budget, Schedule
from gapfx.schedules import gap
from gapfx.task import TASK_FORMATS


@SCHEDULES.register("backwards")
def backwards(budget: Budget, num_groups: int) -> Schedule:
    """GaP from the last group to the first; then a full fine-tune."""
    phases = (
        replace(
            phase,
            name=f"{phase.name} of those from the end" if phase.grow else phase.name,
            grow=_mirrored(phase.grow, num_groups),
            prune=_mirrored(phase.prune, num_groups),
        )
        for phase in gap(budget, num_groups).phases
    )
    return Schedule(tuple(phases))


def _mirrored(groups: tuple[int, ...], num_groups: int) -> tuple[int, ...]:
    return tuple(num_groups - 1 - group for group in groups)


@CRITERIA.register("relative-magnitude")
def relative_magnitude(weight: Tensor, generator: torch.Generator) -> Tensor:
    """|w| over the norm of its output's weights."""
    norms = weight.flatten(1).norm(dim=1).clamp_min(torch.finfo(weight.dtype).tiny)
    return (weight.flatten(1).abs() / norms[:, None]).view(weight.shape)


@dataclass(frozen=True)
class Outputs:
    """Whole outputs are zero or kept, by the sum of their scores."""

    @property
    def fixed_sparsity(self) -> float | None:
        """None: any sparsity, in steps of an output."""
        return None

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Needs outputs and inputs."""
        return None if len(shape) > 1 else "it has no inputs"

    def num_kept(self, shape: tuple[int, ...], sparsity: float) -> int:
        """Nearest whole number of outputs, at least one, in weights."""
        return kept_count(shape[0], sparsity) * (torch.Size(shape).numel() // shape[0])

    def mask(self, score: Tensor, sparsity: float) -> Tensor:
        """The outputs with the highest sums."""
        sums = reduce(score.flatten(1), "o i -> o", "sum")
        kept = top_mask(sums, kept_count(len(sums), sparsity))
        return repeat(kept, "o -> o i", i=score[0].numel()).view(score.shape)


@PATTERNS.register("outputs")
def outputs(options: str) -> Outputs:
    """`outputs`, which has no options."""
    if options:
        raise UserError(f"the pattern outputs has no options, got {options!r}", fix="write --pattern outputs")
    return Outputs()


@register
@dataclass(frozen=True)
class CountGroups(Analysis[int]):
    """The number of groups that the partition has made, at least `least`."""

    name: ClassVar[str] = "count-groups"
    least: int = 1

    def compute(self, unit: Unit) -> int:
        """Raises UserError for fewer."""
        found = len(unit.latest(Partition))
        if found < self.least:
            raise UserError(f"{found} groups are fewer than {self.least}", fix="give more --groups")
        return found


Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Classifier:
    """What a TOML file says: layers of torch.nn by name and sizes, and a data file with arrays `train_x`, `train_y`...

    Its functions are those of a task.
    """

    path: Path
    layers: tuple[Mapping[str, Any], ...]
    data_file: Path

    def model(self) -> nn.Module:
        """The layers one after the other."""
        return nn.Sequential(*(self._layer(**layer) for layer in self.layers))

    def _layer(self, kind: str, sizes: Iterable[Any] = (), **options: Any) -> nn.Module:
        found = getattr(nn, kind, None)
        if not (isinstance(found, type) and issubclass(found, nn.Module)):
            raise TaskError(f"torch.nn has no layer {kind!r}", where=str(self.path), fix="name a class of torch.nn")
        return found(*sizes, **options)

    def data(self, split: str) -> TensorDataset:
        """Samples of a split."""
        with np.load(self.data_file) as arrays:
            return TensorDataset(*(torch.from_numpy(arrays[f"{split}_{name}"]) for name in "xy"))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of classes."""
        return F.cross_entropy(model(batch[0]).float(), batch[1])

    def evaluate(self, model: nn.Module, loader: Iterable[Batch]) -> dict[str, float]:
        """Share of right classes."""
        return {"accuracy": float(torch.cat([(model(x).argmax(1) == y).float() for x, y in loader]).mean())}


@TASK_FORMATS.register(".toml")
def toml_file(path: Path) -> Mapping[str, Any]:
    """`data = "file.npz"`, a `[[layers]]` table for each layer with its `kind` and `sizes`, and `[defaults]`."""
    facts = tomllib.loads(path.read_text())
    for name in ("layers", "data"):
        if name not in facts:
            raise TaskError(f"the task has no {name}", where=str(path), fix=f"add {name}")
    task = Classifier(path, tuple(facts["layers"]), path.parent / facts["data"])
    functions = {name: getattr(task, name) for name in ("model", "data", "loss", "evaluate")}
    return functions | {"defaults": facts.get("defaults", {})}
