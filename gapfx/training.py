"""One training run of a task, from its files to its files: what `gapfx sparsify` does on every rank."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, default_collate

from gapfx.compiler import Observer, Watcher
from gapfx.errors import TaskError
from gapfx.plan import Plan
from gapfx.progress import SilentProgress, open_progress
from gapfx.recording import Recording
from gapfx.results import write_results
from gapfx.run_dir import RunDir
from gapfx.runtime.checkpoint import load_checkpoint
from gapfx.runtime.engine import EngineOptions, local_device, process_group
from gapfx.runtime.feed import DeviceLoader, Feed, blaming_data, is_map_style, whole_loader
from gapfx.runtime.learning_rate import warmup_cosine
from gapfx.runtime.loop import Job, Pace, initial_state, train
from gapfx.runtime.ranks import on_rank_0
from gapfx.runtime.seeds import seed_everything
from gapfx.schedule import Budget, with_schedule
from gapfx.settings import Settings
from gapfx.sparse import Compiled, CompileOptions, compile_model
from gapfx.task import Task

# Streams of random numbers outside of training steps, which take (seed, step >= 0, micro-batch).
_MODEL_STREAM, _DATA_STREAM = -1, -2
DEFAULT_LR = 1e-3


@dataclass(frozen=True)
class Request:
    """What the user asked for beside the settings."""

    out: Path
    resume: bool = False
    force: bool = False
    plan: Path | None = None
    passes: str = ""
    observer: Observer | None = None
    watchers: tuple[Watcher, ...] = ()
    stream: TextIO = field(default_factory=lambda: sys.stdout)


def run_training(task: Task, settings: Settings, request: Request) -> dict[str, Any]:
    """Train on all ranks and give the summary back on each; rank 0 writes the files of the run directory."""
    task.need("data", "loss")
    with process_group():
        return _run_in_group(task, settings, request)


def _run_in_group(task: Task, settings: Settings, request: Request) -> dict[str, Any]:
    run = RunDir(request.out)
    on_rank_0(lambda: _check_run(run, settings, request))
    plan = run.saved_plan() if request.resume else None
    if plan is None and request.plan is not None:
        plan = Plan.load(request.plan)
    feed = make_feed(task, settings, _rank(), torch.distributed.get_world_size())
    compiled = compile_task(task, settings, feed, plan, request)
    plan = with_phases(compiled.plan, settings, feed)
    # Made only now, so that a mistake that shows up to here leaves nothing behind.
    on_rank_0(lambda: None if request.resume else run.create(settings, plan, force=request.force))
    job = _job(task, settings, run, feed, dataclasses.replace(compiled, plan=plan))
    return _train(task, settings, request, run, job)


def _train(task: Task, settings: Settings, request: Request, run: RunDir, job: Job) -> dict[str, Any]:
    found = load_checkpoint(run.checkpoints) if request.resume else None
    state, problems = found or (initial_state(job), [])
    on_rank_0(lambda: run.rewind_metrics(state.step if found else -1))
    is_writer = _rank() == 0
    progress = open_progress(job.plan, start_step=state.step, stream=request.stream) if is_writer else SilentProgress()
    with progress, _stop_on_signal() as should_stop:
        recording = Recording(run.metrics if is_writer else None, job.plan, progress)
        for problem in problems:
            progress.note(f"{problem}; continuing from step {state.step}")
        recording.start(settings, state, is_resumed=found is not None)
        began = time.monotonic()
        gc.freeze()  # the collection at each phase's end need not look at the libraries again
        job = dataclasses.replace(job, emit=recording.emit, should_stop=should_stop)
        train(job, state)
        seconds = recording.seconds_before + time.monotonic() - began
        recording.emit({"event": "end", "step": state.step, "phase": len(job.plan.phases), "seconds": seconds})
    return write_results(task, settings, run, job, state, seconds)


def make_feed(task: Task, settings: Settings, rank: int, world_size: int) -> Feed:
    """The task's training data as micro-batches of this rank. Raises TaskError for data that is none."""
    micro_batch, accumulation = settings.batches(world_size)
    return Feed(
        data=load_data(task, settings, "train"),
        micro_batch=micro_batch,
        accumulation=accumulation,
        world_size=world_size,
        rank=rank,
        seed=settings.seed,
        collate=task.collate or default_collate,
        given_steps_per_epoch=settings.steps_per_epoch,
    )


def load_data(task: Task, settings: Settings, split: str) -> Any:
    """`data(split)`, checked to be a map-style dataset or an iterable of samples."""
    seed_everything(settings.seed, _DATA_STREAM)
    data = task.data(split) if task.data else None
    name = f'data("{split}")'
    if isinstance(data, DataLoader):
        raise TaskError(
            f"{name} returned a DataLoader", where=str(task.path), fix="return its dataset: gapfx makes the batches"
        )
    if isinstance(data, (str, bytes, dict, Tensor)) or not (hasattr(data, "__getitem__") or hasattr(data, "__iter__")):
        raise TaskError(
            f"{name} returned a {type(data).__name__}, which is not a dataset",
            where=str(task.path),
            fix="return a torch Dataset, a list of samples or an iterable of samples",
        )
    if is_map_style(data) and not hasattr(data, "__len__"):
        raise TaskError(f"{name} has __getitem__ but no __len__", where=str(task.path), fix="give the dataset a length")
    return data


def build_model(task: Task, settings: Settings) -> nn.Module:
    """`model()` under the run's seed, in train mode. Raises TaskError when it is no module."""
    seed_everything(settings.seed, _MODEL_STREAM)
    model = task.model()
    if not isinstance(model, nn.Module):
        raise TaskError(
            f"model() returned a {type(model).__name__}", where=str(task.path), fix="return a torch.nn.Module"
        )
    return model.train()


def compile_task(task: Task, settings: Settings, feed: Feed, plan: Plan | None, request: Request) -> Compiled:
    """The task's model, masked, with its plan; captured on the first micro-batch and verified on the second."""
    assert task.loss is not None
    loss, model = task.loss, build_model(task, settings)
    seed_everything(settings.seed, _DATA_STREAM)
    loader = blaming_data(whole_loader(feed.data, feed.micro_batch, feed.collate))
    batches = list(itertools.islice(loader, 3))
    if not batches:
        raise TaskError('data("train") is empty', where=str(task.path), fix="return at least one batch of samples")
    options = compile_options(settings, request.passes)
    # The last batch may be too small for a forward in train mode, so the second one counts if it is not the last.
    first, second = batches[0], batches[len(batches) > 2]
    return compile_model(
        model,
        lambda m: loss(m, first),
        options,
        plan=plan,
        observer=request.observer,
        watchers=request.watchers,
        check=lambda m: loss(m, second),
    )


def compile_options(settings: Settings, passes: str = "") -> CompileOptions:
    """The part of the settings that the compiler needs."""
    return CompileOptions(
        sparsity=settings.sparsity,
        groups=settings.groups,
        partition=settings.partition,
        globs=settings.group,
        pattern=settings.pattern,
        allocation=settings.allocation,
        criterion=settings.criterion,
        dense=settings.dense,
        prune_embeddings=settings.prune_embeddings,
        seed=settings.seed,
        passes=passes,
    )


def with_phases(plan: Plan, settings: Settings, feed: Feed) -> Plan:
    """The plan with the phase table of the settings; a plan that brings its own phases keeps them."""
    if plan.phases:
        return plan
    per_epoch = feed.steps_per_epoch
    budget = Budget(
        rounds=settings.rounds,
        phase_steps=round(settings.phase_epochs * per_epoch),
        finetune_steps=round(settings.finetune_epochs * per_epoch),
        state=settings.state,
    )
    return with_schedule(plan, settings.method, budget)


def _job(task: Task, settings: Settings, run: RunDir, feed: Feed, compiled: Compiled) -> Job:
    assert task.loss is not None
    evaluate_every = round(settings.eval_epochs * feed.steps_per_epoch)
    return Job(
        plan=compiled.plan,
        module=compiled.module,
        feed=feed,
        loss=task.loss,
        optimizer=task.optimizer or _adamw,
        engine=EngineOptions(feed.micro_batch, feed.accumulation, settings.clip, settings.dtype, settings.zero),
        checkpoints=run.checkpoints,
        evaluate=make_evaluate(task, settings),
        lr=task.lr or warmup_cosine,
        pace=Pace(settings.log_every, evaluate_every, settings.checkpoint_every, settings.keep_checkpoints),
        seed=settings.seed,
    )


def _adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=DEFAULT_LR)


def make_evaluate(task: Task, settings: Settings) -> Callable[[nn.Module], dict[str, float]]:
    """Metrics of a module on the validation data: the task's own, else the mean loss."""
    data = load_data(task, settings, "val")
    loader = whole_loader(data, settings.batch_size, task.collate or default_collate)

    def evaluate(module: nn.Module) -> dict[str, float]:
        dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        moved = DeviceLoader(loader, local_device(), dtype)
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


def _check_run(run: RunDir, settings: Settings, request: Request) -> None:
    if request.resume:
        run.check_resume(settings)
    else:
        run.check_new(force=request.force)


def _rank() -> int:
    return torch.distributed.get_rank()


@contextmanager
def _stop_on_signal() -> Generator[Callable[[], bool]]:
    """The first Ctrl-C (or SIGTERM) asks for a stop after the step; the second one stops at once."""
    asked = threading.Event()

    def ask(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
