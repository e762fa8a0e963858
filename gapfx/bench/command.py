"""`gapfx bench`: what is timed for a task or a run, within the time and until Ctrl-C."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gapfx.bench.clock import Stopwatch
from gapfx.bench.compilation import reserved
from gapfx.bench.deployed import deploy
from gapfx.bench.findings import Findings
from gapfx.bench.inference import ModelTimer
from gapfx.bench.layers import time_layers
from gapfx.bench.models import LOWERING, Bench, time_model
from gapfx.bench.served_layers import TOKENS, time_served
from gapfx.bench.two_of_four import refusal, time_two_of_four
from gapfx.doctor import processor
from gapfx.kernels import native
from gapfx.plan import Plan
from gapfx.run_dir import RunDir
from gapfx.runtime.feed import Feed, whole_loader
from gapfx.settings import Settings
from gapfx.task import Task
from gapfx.training import make_feed
from gapfx.two_of_four import capability_of

LAYER_SHARE = 0.3
MODEL_SHARE, LAYERS_OF_REST = 0.5, 0.6
STOPPED = "stopped by Ctrl-C: only what was timed so far is shown"


def bench_task(
    task: Task, settings: Settings, threads: Sequence[int], watch: Stopwatch, *, with_compile: bool
) -> Findings:
    """Layers and whole model of a task at its micro-batch, with each number of threads.

    Keeps times of layers, as a plan does.
    """
    task.need("data", "loss")
    settings = dataclasses.replace(settings, form="compact")
    feed = make_feed(task, settings, rank=0, world_size=1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(task, settings, feed, None, device, with_compile)
    bench = dataclasses.replace(bench, batch=bench.on_device(_first_batch(feed)))
    plan: list[Plan] = []

    def measure(share: float) -> None:
        # All lowered products, to know the classes of layers and their sizes.
        compiled = watch.keep(LOWERING, lambda: bench.compiled(kernels="sparse", calibrate=False))
        plan.append(compiled.plan)
        cases = [case for choice in compiled.choices.by_weight.values() for case in choice.cases]
        positions = max((case.positions for case in cases), default=0)
        time_layers(watch, cases, device.type, LAYER_SHARE * share)
        if not refusal(_patterns(plan), capability_of(device)):
            time_two_of_four(plan[-1].weights(), watch, (positions,), LAYER_SHARE * share)
        time_model(bench, watch, positions, watch.left * share)

    notes = _on_threads(measure, threads)
    num_groups = len(plan[0].groups) if plan else 0
    facts = (_device(device), settings.dtype, settings.sparsity, settings.pattern, num_groups)
    without = refusal(_patterns(plan), capability_of(device))
    return Findings(*facts, tuple(watch.timings), (*notes, *watch.notes, *([without] if without else [])))


def bench_run(run: Path, threads: Sequence[int], watch: Stopwatch, *, with_compile: bool = True) -> Findings:
    """The whole model of a finished run, dense and loaded, at a few batch sizes, and its layers. Writes no file."""
    directory = RunDir(run)
    deployed = deploy(run, watch)
    settings, plan = directory.settings(), Plan.load(directory.plan)
    weights = list(plan.weights())
    timer = ModelTimer(deployed, watch)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    without = refusal({weight.pattern for weight in weights}, capability_of(device))

    def measure(share: float) -> None:
        kept = reserved(watch, watch.left * share) / watch.left if with_compile and watch.left > 0 else 0.0
        timer.time(MODEL_SHARE * (share - kept))
        time_served(deployed, watch, LAYERS_OF_REST * (share - kept))
        if not without:
            time_two_of_four(weights, watch, TOKENS, LAYERS_OF_REST * (share - kept))
        if with_compile:
            timer.time_compiled(share)

    notes = _on_threads(measure, threads)
    facts = (processor(), "fp32", settings.sparsity, settings.pattern, len(plan.groups))
    reasons = Counter(weight.reason for weight in deployed.weights if weight.reason)
    dense = (f"{number} weights are served dense: {reason}" for reason, number in reasons.items())
    missing = native.missing_reason()
    kernels = f"no native kernels: {missing}" if missing else ""
    return Findings(*facts, tuple(watch.timings), (*notes, *watch.notes, *dense, *filter(None, (kernels, without))))


def _on_threads(measure: Callable[[float], None], threads: Sequence[int]) -> tuple[str, ...]:
    """Measure with each number of threads, each with its share of the time that is left; gives notes."""
    before = torch.get_num_threads()
    try:
        for index, number in enumerate(threads):
            torch.set_num_threads(number)
            measure(1 / (len(threads) - index))
    except KeyboardInterrupt:
        return (STOPPED,)
    finally:
        torch.set_num_threads(before)
    return ()


def _first_batch(feed: Feed) -> Any:
    return next(itertools.islice(whole_loader(feed.data, feed.micro_batch, feed.collate), 1))


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(0) if device.type == "cuda" else processor()


def _patterns(plans: Sequence[Plan]) -> set[str]:
    return {weight.pattern for plan in plans for weight in plan.weights()}
