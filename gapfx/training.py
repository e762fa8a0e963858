"""One training run of a task, from its files to its files: what `gapfx sparsify` does on every rank."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from gapfx.compiler import Observer, Watcher
from gapfx.errors import TaskError
from gapfx.estimate import Setup
from gapfx.metrics import metrics_on
from gapfx.origin import fill_from
from gapfx.phasing import check_flags, with_phases
from gapfx.plan import Plan
from gapfx.progress import SilentProgress, open_progress
from gapfx.recording import Recording, rewound
from gapfx.results import write_results
from gapfx.run_dir import RunDir
from gapfx.runtime.checkpoint import check_model, load_checkpoint
from gapfx.runtime.engine import EngineOptions, check_config, compute_dtype, optimizer_for, process_group
from gapfx.runtime.evaluation import Evaluate
from gapfx.runtime.feed import Feed, blaming_data, is_map_style, whole_loader
from gapfx.runtime.learning_rate import factor_at, scaled, warmup_cosine
from gapfx.runtime.loop import initial_state, train
from gapfx.runtime.memory import keep_activations_alone, largest_activation, returning_memory
from gapfx.runtime.paged import in_files
from gapfx.runtime.ranks import Peers, on_rank_0, told_by_rank_0
from gapfx.runtime.rendezvous import is_restarted
from gapfx.runtime.seeds import seed_everything
from gapfx.runtime.skeleton import hollow, skeleton_of
from gapfx.runtime.steps import Job, Pace
from gapfx.runtime.stop import stop_on_signal
from gapfx.settings import Settings
from gapfx.sparse import Compiled, CompileOptions, compile_model
from gapfx.task import Task
from gapfx.writers.offering import check_writers

# Streams of random numbers outside of training steps, which take (seed, step >= 0, micro-batch).
_MODEL_STREAM, _DATA_STREAM = -1, -2
DEFAULT_LR = 1e-3


@dataclass(frozen=True)
class Request:
    """What the user asked for beside the settings; `flags` are those settings that the command line has named."""

    out: Path
    resume: bool = False
    force: bool = False
    plan: Path | None = None
    flags: Mapping[str, Any] = field(default_factory=dict[str, Any])
    explain: bool = False
    calibration_seconds: float = CompileOptions.calibration_seconds
    observer: Observer | None = None
    watchers: tuple[Watcher, ...] = ()
    stream: TextIO = field(default_factory=lambda: sys.stdout)


def run_training(task: Task, settings: Settings, request: Request) -> dict[str, Any]:
    """Train on all ranks and give the summary back on rank 0, which writes the files of the run directory."""
    task.need("data", "loss")
    with process_group():
        return _run_in_group(task, settings, request)


def _run_in_group(task: Task, settings: Settings, request: Request) -> dict[str, Any]:
    run = RunDir(request.out)
    if is_restarted() and told_by_rank_0(run.config.is_file):
        request = dataclasses.replace(request, resume=True)
    on_rank_0(lambda: _check_run(run, settings, request))
    plan = saved = run.saved_plan() if request.resume else None
    run.check_plan(request.plan, saved)
    given = Plan.load(request.plan) if request.plan else None
    plan = plan or given
    feed = make_feed(task, settings, _rank(), torch.distributed.get_world_size())
    if given is not None:
        check_flags(given, settings, feed.steps_per_epoch, request.flags, str(request.plan))
    check_config(engine_options(settings, feed), feed.world_size)  # a mistake in it is told now
    # What kernels a run has is in its plan: nothing is measured again.
    asked = dataclasses.replace(settings, kernels="auto") if saved else settings
    with returning_memory():
        compiled = compile_task(task, asked, feed, plan, request)
    plan = with_phases(compiled.plan, settings, feed.steps_per_epoch)
    job = _job(task, settings, run, feed, dataclasses.replace(compiled, plan=plan))
    optimizer_for(job.module, job.optimizer, job.engine)
    factor_at(0, plan.phases[0], plan.num_steps, job.lr)
    # Made only now, so that a mistake that shows up to here leaves nothing behind.
    on_rank_0(
        lambda: None if request.resume else run.create(settings, plan, (task.path, task.entry), force=request.force)
    )
    keep_activations_alone(largest_activation(plan, compute_dtype(job.engine).itemsize))
    return _train(task, settings, request, run, job, compiled.notes)


def _train(
    task: Task, settings: Settings, request: Request, run: RunDir, job: Job, notes: Sequence[str]
) -> dict[str, Any]:
    found = load_checkpoint(run.checkpoints, Peers.all()) if request.resume else None
    with returning_memory():
        skeleton = skeleton_of(job.module)
        if found is not None:
            check_model(job.module, found[0], run.checkpoints)
        state, problems = found or (initial_state(job), [])
        for parameter in job.module.parameters():
            hollow(parameter)
        job = dataclasses.replace(job, module=skeleton)
    is_writer = _rank() == 0
    peaks = run.peaks() if is_writer else []
    opened: list[Any] = []
    on_rank_0(lambda: opened.extend(rewound(run, job.plan, settings, state.step if found else None)))
    writers, warnings = opened or (None, [])
    progress = open_progress(job.plan, start_step=state.step, stream=request.stream) if is_writer else SilentProgress()
    recording = Recording(run.metrics if is_writer else None, job.plan, progress, writers)
    with recording, stop_on_signal() as should_stop:
        with progress:
            for note in notes:
                progress.note(note)
            recording.start(state, is_resumed=found is not None, peaks=peaks)
            fallbacks = [{"event": "fallback", "step": state.step, "problem": problem} for problem in problems]
            for event in (*fallbacks, *warnings):
                recording.emit(event)
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
    loss = task.loss
    options = compile_options(settings)
    limit = request.calibration_seconds
    options = dataclasses.replace(options, explain=request.explain, calibration_seconds=limit)
    with _building(settings, feed, request) as building:
        with building:
            model = build_model(task, settings)
            if settings.init and not request.resume:
                fill_from(model, Path(settings.init))
        first, second = _two_batches(task, settings, feed)
        return compile_model(
            model,
            lambda m: loss(m, first),
            options,
            plan=plan,
            observer=request.observer,
            watchers=request.watchers,
            check=lambda m: loss(m, second),
            once=told_by_rank_0 if torch.distributed.is_initialized() else lambda action: action(),
        )


def _building(
    settings: Settings, feed: Feed, request: Request
) -> AbstractContextManager[AbstractContextManager[object]]:
    """Where the model is built: outside of memory where no rank shall hold it whole."""
    return in_files(request.out) if settings.zero == 3 and feed.world_size > 1 else nullcontext(nullcontext())


def first_batches(task: Task, settings: Settings) -> tuple[nn.Module, Any, Any]:
    """The model of a task and two batches that its loss takes, as they come in a training on one rank."""
    model = build_model(task, settings)
    return model, *_two_batches(task, settings, make_feed(task, settings, 0, 1))


def _two_batches(task: Task, settings: Settings, feed: Feed) -> tuple[Any, Any]:
    seed_everything(settings.seed, _DATA_STREAM)
    loader = blaming_data(whole_loader(feed.data, feed.micro_batch, feed.collate))
    batches = list(itertools.islice(loader, 3))
    if not batches:
        raise TaskError('data("train") is empty', where=str(task.path), fix="return at least one batch of samples")
    # The last batch may be too small for a forward in train mode, so the second one counts if it is not the last.
    return batches[0], batches[len(batches) > 2]


def compile_options(settings: Settings) -> CompileOptions:
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
        form=settings.form,
        kernels=settings.kernels,
        calibrate=settings.calibrate,
        dtype=settings.dtype,
        seed=settings.seed,
        passes=settings.passes,
    )


def _job(task: Task, settings: Settings, run: RunDir, feed: Feed, compiled: Compiled) -> Job:
    assert task.loss is not None
    planned = {weight.fqn for weight in compiled.plan.weights()}
    live = frozenset(planned - compiled.plan.in_place() if settings.form == "compact" else ())
    evaluate_every = round(settings.eval_epochs * feed.steps_per_epoch)
    return Job(
        plan=compiled.plan,
        module=compiled.module,
        feed=feed,
        loss=task.loss,
        optimizer=task.optimizer or _adamw,
        engine=engine_options(settings, feed, is_live=bool(live)),
        checkpoints=run.checkpoints,
        live=live,
        evaluate=make_evaluate(task, settings, "val"),
        test=make_evaluate(task, settings, "test") if settings.test else None,
        lr=scaled(task.lr or warmup_cosine, settings.lr_scale),
        pace=Pace(settings.log_every, evaluate_every, settings.checkpoint_every, settings.keep_checkpoints),
        seed=settings.seed,
        regrow_warmup=settings.regrow_warmup,
    )


def engine_options(settings: Settings, feed: Feed, *, is_live: bool = False) -> EngineOptions:
    """The part of the settings that an engine needs."""
    return EngineOptions(
        micro_batch=feed.micro_batch,
        accumulation=feed.accumulation,
        clip=settings.clip,
        dtype=settings.dtype,
        zero_stage=settings.zero,
        is_live=is_live,
        deepspeed=json.loads(settings.deepspeed or "{}"),
    )


def setup_of(task: Task, settings: Settings) -> Setup:
    """How the settings spread a run, for an estimate; the optimizer's moments are those that it makes of a weight."""
    # On the CPU, whatever the device of the day is.
    weight = nn.Parameter(torch.zeros(4, 4, device="cpu"))
    optimizer = (task.optimizer or _adamw)([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    moments = sum(isinstance(v, Tensor) and v.shape == weight.shape for v in optimizer.state[weight].values())
    value_bytes = 2 if settings.dtype == "bf16" else 4
    return Setup(settings.nproc, settings.zero, value_bytes, moments, settings.form == "compact")


def _adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    # One pass over the state without temporaries as large as it.
    return torch.optim.AdamW(params, lr=DEFAULT_LR, fused=True)


def make_evaluate(task: Task, settings: Settings, split: str) -> Evaluate:
    """Metrics of a module on `data(split)`: the task's own, else the mean loss."""
    return metrics_on(task, load_data(task, settings, split), settings.batch_size)


def _check_run(run: RunDir, settings: Settings, request: Request) -> None:
    check_writers(settings.log_to, is_new=not request.resume)
    if request.resume:
        run.check_resume(settings)
    else:
        run.check_new(force=request.force)


def _rank() -> int:
    return torch.distributed.get_rank()
