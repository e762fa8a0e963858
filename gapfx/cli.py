"""The command line. It imports torch only inside a command, so that help and mistakes cost nothing."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from gapfx import cli_flags as flag
from gapfx.errors import GapfxError, Interrupted, UserError
from gapfx.kernels import setting

INTERRUPTED_CODE = Interrupted.exit_code
# A mistake is told by rank 0 first, by others after a while, and before ranks that only lost a peer end the run.
_AFTER_RANK_0_SECONDS, _AFTER_ALL_SECONDS = 2, 5
# What gloo and NCCL say when a process at the other end is gone.
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "NCCL")
_WAITING = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
_USER_ERRNOS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM)

app = typer.Typer(
    name="gapfx",
    help="Train any PyTorch model sparse from scratch, by scheduled grow-and-prune (GaP).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _example(command: str) -> str:
    return f"For example: gapfx {command}"


@app.command(epilog=_example("sparsify task.py --sparsity 0.9 --groups 4 --nproc 2"))
def sparsify(
    task: flag.TaskArgument,
    sparsity: flag.Sparsity = None,
    groups: flag.Groups = None,
    partition: flag.PartitionOption = None,
    group: flag.GroupGlobs = None,
    pattern: flag.PatternOption = None,
    allocation: flag.AllocationOption = None,
    criterion: flag.Criterion = None,
    dense: flag.Dense = None,
    prune_embeddings: flag.PruneEmbeddings = None,
    method: flag.Method = None,
    replicas: flag.Replicas = None,
    rounds: flag.Rounds = None,
    phase_epochs: flag.PhaseEpochs = None,
    finetune_epochs: flag.FinetuneEpochs = None,
    update_steps: flag.UpdateSteps = None,
    steps_per_epoch: flag.StepsPerEpoch = None,
    batch_size: flag.BatchSize = None,
    micro_batch: flag.MicroBatch = None,
    clip: flag.Clip = None,
    lr_scale: flag.LrScale = None,
    state: flag.State = None,
    phase_lr: flag.PhaseLr = None,
    growth: flag.Growth = None,
    landing: flag.Landing = None,
    exchange: flag.Exchange = None,
    regrow_warmup: flag.RegrowWarmup = None,
    dtype: flag.Dtype = None,
    zero: flag.Zero = None,
    deepspeed: flag.DeepSpeed = None,
    form: flag.FormOption = None,
    kernels: flag.Kernels = None,
    calibrate: flag.Calibrate = None,
    nproc: flag.Nproc = None,
    seed: flag.Seed = None,
    test: flag.Test = None,
    out: flag.Out = None,
    log_every: flag.LogEvery = None,
    log_to: flag.LogTo = None,
    eval_epochs: flag.EvalEpochs = None,
    checkpoint_every: flag.CheckpointEvery = None,
    keep_checkpoints: flag.KeepCheckpoints = None,
    plan: flag.PlanOption = None,
    passes: flag.Passes = None,
    init: flag.Init = None,
    show_passes: flag.ShowPasses = False,
    entry: flag.Entry = "",
    resume: flag.Resume = False,
    force: flag.Force = False,
    debug: flag.Debug = False,
) -> None:
    """Train TASK sparse from scratch and write the run directory.

    Defaults are gapfx's own; `defaults` of the task file win over them, and flags over both.
    """
    from gapfx.commands import Source, train_task

    source = Source(task, entry, _given(locals()))
    raise typer.Exit(train_task(source, out, plan, show_passes=show_passes, resume=resume, force=force))


@app.command("plan", epilog=_example("plan task.py --sparsity 0.9 --figure groups.svg --ranks 1,8"))
def plan_command(
    task: flag.TaskArgument,
    sparsity: flag.Sparsity = None,
    groups: flag.Groups = None,
    partition: flag.PartitionOption = None,
    group: flag.GroupGlobs = None,
    pattern: flag.PatternOption = None,
    allocation: flag.AllocationOption = None,
    dense: flag.Dense = None,
    prune_embeddings: flag.PruneEmbeddings = None,
    method: flag.Method = None,
    replicas: flag.Replicas = None,
    rounds: flag.Rounds = None,
    phase_epochs: flag.PhaseEpochs = None,
    finetune_epochs: flag.FinetuneEpochs = None,
    state: flag.State = None,
    phase_lr: flag.PhaseLr = None,
    growth: flag.Growth = None,
    landing: flag.Landing = None,
    exchange: flag.Exchange = None,
    update_steps: flag.UpdateSteps = None,
    steps_per_epoch: flag.StepsPerEpoch = None,
    batch_size: flag.BatchSize = None,
    micro_batch: flag.MicroBatch = None,
    dtype: flag.Dtype = None,
    zero: flag.Zero = None,
    form: flag.FormOption = None,
    kernels: flag.Kernels = None,
    calibrate: flag.Calibrate = None,
    seed: flag.Seed = None,
    ranks: flag.Ranks = "",
    memory: flag.Memory = "",
    device: flag.Device = "",
    on_meta: flag.OnMeta = False,
    plan: flag.PlanOption = None,
    passes: flag.Passes = None,
    show_passes: flag.ShowPasses = False,
    entry: flag.Entry = "",
    input_shapes: flag.InputShapes = "",
    emit_graph: flag.EmitGraph = None,
    figure: flag.Figure = None,
    as_json: flag.PlanJson = False,
    debug: flag.Debug = False,
) -> None:
    """Show groups, sparsity and phases without training.

    Also what stays dense and why, and which kernels are faster here. The defaults are those of sparsify.
    """
    from gapfx.commands import Source
    from gapfx.planning import Forecast, PlanFiles, show_plan

    source, asked = Source(task, entry, _given(locals())), Forecast(ranks, memory, device, on_meta)
    with _alone_on_stdout(as_json):
        files = PlanFiles(emit_graph, figure)
        text = show_plan(source, input_shapes, plan, files, asked, show_passes=show_passes, as_json=as_json)
    typer.echo(text)


@app.command(epilog=_example("bench runs/task-gap --seconds 30 --threads 1,2"))
def bench(
    task: Annotated[str, typer.Argument(help="Task file, or the directory of a finished run.")],
    sparsity: flag.Sparsity = None,
    groups: flag.Groups = None,
    pattern: flag.PatternOption = None,
    dense: flag.Dense = None,
    batch_size: flag.BatchSize = None,
    micro_batch: flag.MicroBatch = None,
    kernels: flag.Kernels = None,
    dtype: flag.Dtype = None,
    threads: Annotated[str, typer.Option(help="Numbers of threads, such as 1,2; torch's own by default.")] = "",
    seconds: flag.BenchSeconds = 60,
    with_compile: Annotated[bool, typer.Option("--compile/--no-compile", help="Time torch.compile too.")] = True,
    entry: flag.Entry = "",
    as_json: flag.AsJson = False,
    debug: flag.Debug = False,
) -> None:
    """Time layers and model of TASK or of a run, dense and sparse, and say what sparsity is worth on this device.

    Of a task: training steps, by its settings and these flags. Of a run: inference, as gapfx.load gives it.
    """
    from gapfx.commands import Source, show_bench

    with _alone_on_stdout(as_json):
        source = Source(task, entry, _given(locals()))
        text, is_stopped = show_bench(source, threads, seconds, with_compile=with_compile, as_json=as_json)
    typer.echo(text)
    raise typer.Exit(INTERRUPTED_CODE if is_stopped else 0)


@app.command("passes", epilog=_example("passes"))
def passes_command() -> None:
    """List the compiler passes with their options."""
    from gapfx.commands import describe_passes

    typer.echo(describe_passes())


@app.command(epilog=_example("compare study.toml --parallel 2"))
def compare(
    study: Annotated[Path, typer.Argument(help="TOML file that names a task, methods, sparsities and seeds.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the runs; runs/STUDY by default.")] = None,
    parallel: Annotated[int, typer.Option(help="Runs at once, each in a process of its own.", min=1)] = 1,
    collect: Annotated[bool, typer.Option("--collect", help="Train nothing: show what is finished.")] = False,
    as_json: flag.AsJson = False,
    debug: flag.Debug = False,
) -> None:
    """Compare methods on a task at equal epochs and at equal operations, with tables and a page.

    The study is a TOML file such as examples/studies/fashion.toml. What is finished is not trained again.
    """
    from gapfx.commands import compare_study

    with _alone_on_stdout(as_json):
        text = compare_study(study, out, parallel, collect=collect, as_json=as_json)
    typer.echo(text)


@app.command("export", epilog=_example("export runs/task-gap --to onnx --out model.onnx"))
def export_command(
    source: Annotated[Path, typer.Argument(help="Run directory, .gapfx file, or dense safetensors (file or folder).")],
    to: Annotated[str, typer.Option(help="gapfx, safetensors, csr, 2:4, onnx or program.")],
    out: Annotated[Path | None, typer.Option(help="File or folder to write; beside the source by default.")] = None,
    compress: Annotated[bool, typer.Option("--compress", help="gapfx: compress values too (needs zstandard).")] = False,
    shard_mib: Annotated[int, typer.Option(help="safetensors: files of at most so many MiB, 0 for one.", min=0)] = 0,
    sparse: Annotated[bool, typer.Option("--sparse", help="onnx: sparse weights as sparse initialisers.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    debug: flag.Debug = False,
) -> None:
    """Write a trained model in another form, and check that it computes the same where it can be run.

    From a run, a .gapfx file or dense safetensors; onnx and program (torch.export) need a run.
    """
    from gapfx.export import ExportOptions, export

    typer.echo(export(source, to, out, ExportOptions(compress, shard_mib, sparse), force=force))


@app.command(epilog=_example("report runs/task-gap"))
def report(run: Annotated[Path, typer.Argument(help="Run directory.")], debug: flag.Debug = False) -> None:
    """Write RUN/report.html again and show the result, of an unfinished run too."""
    from gapfx.commands import show_report

    typer.echo(show_report(run))


@app.command(epilog=_example("doctor --json"))
def doctor(as_json: flag.AsJson = False, debug: flag.Debug = False) -> None:
    """Say what this machine offers: versions, devices, threads, memory."""
    from gapfx.doctor import examine, format_findings

    findings = examine()
    typer.echo(json.dumps(findings, indent=1) if as_json else format_findings(findings))


def _alone_on_stdout(as_json: bool) -> contextlib.AbstractContextManager[object]:
    """What a task or a pass prints meanwhile goes to stderr, so that stdout holds JSON alone."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """The flags that name settings, of the local names of a command."""
    return {name: value for name, value in values.items() if name in flag.SETTING_NAMES}


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 done, 1 our fault, 2 the user's mistake, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    _sleep_while_waiting()
    if "LOCAL_RANK" in os.environ:  # the deepspeed launcher says it twice
        arguments = [argument for argument in arguments if not argument.startswith("--local_rank=")]
    try:
        _check_environment()
        code = typer.main.get_command(app).main(args=arguments, prog_name="gapfx", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted; a run continues with --resume", INTERRUPTED_CODE)
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        return _handle(error)
    return code if isinstance(code, int) else 0


def _check_environment() -> None:
    if setting.problem():
        raise UserError(setting.problem(), where="the environment", fix="unset it, or give it one of these")


def _sleep_while_waiting() -> None:
    """Threads of one product wait for each other asleep, as far as the user does not say how they shall wait.

    OpenMP's own way is to spin. On a machine with other work a thread spins for as long as another one is not given a
    core, many times in each step: a run on two busy cores took fifty times as long. Read when torch loads.
    """
    if not _WAITING & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def _handle(error: Exception) -> int:
    is_rank_0 = os.environ.get("RANK", "0") == "0"
    if isinstance(error, UserError):
        if not is_rank_0:
            # Rank 0 says the same; this rank speaks only if the mistake is its own.
            time.sleep(_AFTER_RANK_0_SECONDS)
        return _fail(f"error: {error}", error.exit_code)
    if isinstance(error, Interrupted) and not is_rank_0:
        return error.exit_code
    if isinstance(error, GapfxError):
        return _fail(str(error), error.exit_code)
    if hasattr(error, "show") and hasattr(error, "exit_code"):  # a wrong flag; typer formats it
        error.show()  # pyright: ignore[reportAttributeAccessIssue]
        return 2
    if isinstance(error, OSError) and error.errno in _USER_ERRNOS:
        return _fail(f"error: {error}\n  to do: check the disk and its permissions; --resume continues a run", 2)
    if isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST_PEER):
        code = _fail(f"another rank ended or stopped answering; --resume continues the run\n  {error}", 1)
        time.sleep(_AFTER_ALL_SECONDS)  # the launcher stops the others when one ends, also the one that has a reason
        return code
    if "--debug" not in sys.argv:
        traceback.print_exception(error)
    return _fail("gapfx failed; this is a defect of gapfx", 1)


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr, flush=True)
    return code
