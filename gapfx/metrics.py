"""Metrics of a module by what its task says: its own evaluate(), else the mean loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import default_collate

from gapfx.errors import TaskError
from gapfx.runtime.engine import local_device
from gapfx.runtime.evaluation import Evaluate
from gapfx.runtime.feed import DeviceLoader, whole_loader
from gapfx.task import Task


def metrics_on(task: Task, data: Any, batch_size: int) -> Evaluate:
    """What evaluates a module on all of the data."""
    loader = whole_loader(data, batch_size, task.collate or default_collate)

    def evaluate(module: nn.Module, before_batch: Callable[[], object]) -> dict[str, float]:
        dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        moved = DeviceLoader(loader, local_device(), dtype, before_batch)
        metrics = task.evaluate(module, moved) if task.evaluate else {"loss": _mean_loss(task, module, moved)}
        return _checked_metrics(metrics, task)

    return evaluate


def _checked_metrics(metrics: object, task: Task) -> dict[str, float]:
    wrong = TaskError(
        f"evaluate() returned {metrics!r:.80}", where=str(task.path), fix='return numbers by name, {"accuracy": 0.9}'
    )
    if not isinstance(metrics, Mapping) or not metrics:
        raise wrong
    try:
        return {str(name): float(value) for name, value in cast(Mapping[str, Any], metrics).items()}
    except (TypeError, ValueError):
        raise wrong from None


def _mean_loss(task: Task, module: nn.Module, loader: DeviceLoader) -> float:
    assert task.loss is not None
    total, count = 0.0, 0
    for batch in loader:
        size = next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()), 1)
        total, count = total + float(task.loss(module, batch)) * size, count + size
    if not count:
        raise TaskError('data("val") is empty', where=str(task.path), fix="return at least one sample")
    return total / count
