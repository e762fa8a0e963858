"""The files of a finished run: the model, its summary, its report."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import resource
import sys
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from gapfx.masks import count_kept
from gapfx.plan import Plan
from gapfx.report import write_report
from gapfx.run_dir import RunDir, write_atomically
from gapfx.runtime.engine import local_device
from gapfx.runtime.grow_prune import TrainState, sparsity_now
from gapfx.runtime.loop import Job, build_module
from gapfx.runtime.skeleton import skeleton_of
from gapfx.settings import Settings
from gapfx.sparse import dense_state_dict
from gapfx.task import Task

LOWER_IS_BETTER = ("loss", "error", "perplexity", "bits", "nll", "mse", "mae", "rmse")


def write_results(
    task: Task, settings: Settings, run: RunDir, job: Job, state: TrainState, seconds: float
) -> dict[str, Any]:
    """The summary, on every rank; rank 0 writes model.safetensors, summary.json and report.html."""
    peak_rss = _max_over_ranks(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    summary: dict[str, Any] = {}
    if torch.distributed.get_rank() == 0:
        module = build_module(job.plan, skeleton_of(job.module), state).cpu()
        weights = dense_state_dict(module, job.plan)
        save_file({key: value.contiguous() for key, value in weights.items()}, run.model)
        final = _final_metrics(task, run, job)
        summary = {
            **_sparsity_facts(job.plan, state),
            "metrics": {"final": final, "best": _best(run, final)},
            "seconds": seconds,
            "peak_rss_bytes": peak_rss,
            "world_size": torch.distributed.get_world_size(),
            "zero_stage": settings.zero,
            "form": settings.form,
            "seed": settings.seed,
            "versions": _versions(),
        }
        write_atomically(run.summary, json.dumps(summary, indent=1))
        write_report(run.path)
    return summary


def _final_metrics(task: Task, run: RunDir, job: Job) -> dict[str, float]:
    """Metrics of the plain model with the saved file in it: what somebody who loads the file gets."""
    plain = task.model()
    plain.load_state_dict(load_file(run.model), strict=True)
    if job.evaluate is None:
        return {}
    plain.to(local_device()).eval()
    with torch.no_grad():
        return job.evaluate(plain)


def _sparsity_facts(plan: Plan, state: TrainState) -> dict[str, Any]:
    group_of = plan.group_of()
    kept = {weight.fqn: count_kept(state.bits[weight.fqn]) for weight in plan.weights()}
    zeros = sum(weight.numel - kept[weight.fqn] for weight in plan.weights())
    num_parameters = sum(value.numel() for value in state.weights.values())
    return {
        "method": plan.method,
        "sparsity_target": plan.sparsity,
        "sparsity_actual": sparsity_now(state),
        "sparsity_model": zeros / num_parameters,
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
                choose = min if any(word in name.lower() for word in LOWER_IS_BETTER) else max
                best[name] = choose(value, best.get(name, value))
    return best


def _max_over_ranks(value: int) -> int:
    if torch.distributed.get_world_size() == 1:
        return value
    every = [0] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, value)
    return max(every)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": sys.platform}
    for name in ("gapfx", "torch", "deepspeed", "networkx", "einops", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found
