"""The files of a finished run: the model, its summary, its report."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import sys
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gapfx.direction import is_lower_better
from gapfx.errors import Interrupted, UserError
from gapfx.io.dense_files import DenseFiles
from gapfx.io.write_sparse import write_sparse
from gapfx.model_file import TensorFile, masks_in_file, write_model
from gapfx.report import write_report
from gapfx.run_dir import RunDir, write_atomically
from gapfx.runtime.engine import local_device
from gapfx.runtime.evaluation import evaluated
from gapfx.runtime.exchange import evaluation_module
from gapfx.runtime.grow_prune import sparsity_now
from gapfx.runtime.memory import peak_resident_bytes, returning_memory
from gapfx.runtime.ranks import Peers, on_rank_0
from gapfx.runtime.state import TrainState
from gapfx.runtime.steps import Job
from gapfx.settings import Settings
from gapfx.task import Task


def write_results(
    task: Task, settings: Settings, run: RunDir, job: Job, state: TrainState, seconds: float
) -> dict[str, Any]:
    """The summary, on rank 0, which writes model.safetensors, summary.json and report.html; nothing elsewhere.

    Raises Interrupted when a stop is asked for during the last evaluation.
    """
    summary: dict[str, Any] = {}
    with returning_memory():
        write_model(run.model, job, state)
        found = _sharded_metrics(job, state) if settings.zero == 3 else None
        with masks_in_file(run.path / ".masks.safetensors", state) as masks:
            on_rank_0(lambda: _write_sparse(run, job, masks))
    peaks = Peers.all().tell(peak_resident_bytes())  # what other ranks do ends here
    if torch.distributed.get_rank() == 0:
        with returning_memory():
            final, test = found or _final_metrics(task, run, job)
        peaks[0] = peak_resident_bytes()
        peaks = [max(rank) for rank in zip_longest(peaks, run.peaks(), fillvalue=0)]
        summary = {
            **_sparsity_facts(job, state),
            "metrics": {"final": final, "best": _best(run, final)} | ({"test": test} if test else {}),
            "seconds": seconds,
            "peak_rss_bytes": max(peaks),
            "peak_rss_bytes_by_rank": peaks,
            "world_size": torch.distributed.get_world_size(),
            "zero_stage": settings.zero,
            "form": settings.form,
            "seed": settings.seed,
            "versions": _versions(),
        }
        write_atomically(run.summary, json.dumps(summary, indent=1))
        write_report(run.path)
    return summary


def _write_sparse(run: RunDir, job: Job, masks: Mapping[str, Tensor]) -> None:
    """The model as a sparse file, from the dense one and the packed masks."""
    try:
        with DenseFiles(run.model) as dense:
            write_sparse(run.sparse, dense, plan=job.plan, masks=masks)
    except OSError as error:
        raise UserError(
            f"the model could not be written: {error}",
            where=str(run.sparse),
            fix="free disk space and continue with --resume",
        ) from error


def _final_metrics(task: Task, run: RunDir, job: Job) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics of the plain model with the saved file in it: what somebody who loads the file gets."""
    plain = task.model()
    _load(plain, run.model)
    return _metrics(job, plain.to(local_device()).eval(), Peers())


def _sharded_metrics(job: Job, state: TrainState) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics of the state itself, for a model that may be too large for one rank (collective)."""
    with evaluation_module(job.plan, job.module, state, job.live, job.engine) as module:
        return _metrics(job, module, Peers.all())


def _metrics(job: Job, module: nn.Module, peers: Peers) -> tuple[dict[str, float], dict[str, float]]:
    """On the validation data and on the test data; empty where the job has none."""
    found: list[dict[str, float]] = []
    for evaluate in (job.evaluate, job.test):
        metrics = evaluated(evaluate, module, peers, job.should_stop) if evaluate else {}
        if metrics is None:
            raise Interrupted("stopped in the last evaluation; continue with --resume")
        found.append(metrics)
    return found[0], found[1]


def _load(module: nn.Module, path: Path) -> None:
    """Copy a file of weights into a module, one tensor at a time; a mistake in its keys is torch's error."""
    own = module.state_dict().keys()
    file = TensorFile(path)
    if own != set(file):
        module.load_state_dict(dict(file))
    for key in own:
        module.load_state_dict({key: file[key]}, strict=False)


def _sparsity_facts(job: Job, state: TrainState) -> dict[str, Any]:
    plan = job.plan
    group_of = plan.group_of()
    kept = {weight.fqn: state.num_live(weight.fqn) for weight in plan.weights()}
    zeros = sum(weight.numel - kept[weight.fqn] for weight in plan.weights())
    num_parameters = sum(parameter.numel() for parameter in job.module.parameters())
    return {
        "method": plan.method,
        "sparsity_target": plan.sparsity,
        "sparsity_actual": sparsity_now(state),
        "sparsity_model": zeros / num_parameters,
        "num_parameters": num_parameters,
        "per_weight": {
            w.fqn: {"numel": w.numel, "kept": kept[w.fqn], "group": plan.groups[group_of[w.fqn]].name}
            for w in plan.weights()
        },
        "groups": [{"name": g.name, "weights": [w.fqn for w in g.weights]} for g in plan.groups],
        "phases": [dataclasses.asdict(phase) for phase in plan.phases],
    }


def _best(run: RunDir, final: dict[str, float]) -> dict[str, float]:
    """The best value of each metric among the evaluations at which every group was at its target."""
    target = max((e["sparsity"] for e in run.events() if e["event"] == "eval"), default=0.0)
    best = dict(final)
    for event in run.events():
        if event["event"] == "eval" and event["sparsity"] >= target:
            for name, value in event["metrics"].items():
                choose = min if is_lower_better(name) else max
                best[name] = choose(value, best.get(name, value))
    return best


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": sys.platform}
    for name in ("gapfx", "torch", "deepspeed", "networkx", "einops", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found
