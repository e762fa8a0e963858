"""Flags and arguments of the command line, with their help."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from gapfx.settings import Settings

# Panels of the help, in the order in which the commands name their first flags.
SPARSE, SCHEDULE, TRAINING, MACHINE, RUN = (
    "What becomes sparse",
    "When: method and phases",
    "How steps are made",
    "Ranks, memory and kernels",
    "The run",
)
FORECAST = "What a run would take"
OUTPUT = "What is shown"
SETTING_NAMES = frozenset(field.name for field in dataclasses.fields(Settings))


def _setting(name: str, words: str, panel: str, *names: str) -> Any:
    """The option of a setting, which is None where it is not given; its help tells gapfx's own default."""
    value = getattr(Settings, name)
    is_told = isinstance(value, str | int | float) and not isinstance(value, bool) and value != ""
    return typer.Option(*names, help=f"{words} (default {value})" if is_told else words, rich_help_panel=panel)


def _option(words: str, panel: str, *names: str) -> Any:
    return typer.Option(*names, help=words, rich_help_panel=panel)


TaskArgument = Annotated[
    str,
    typer.Argument(help="Task file: Python with model(), data(split) and loss(model, batch). FILE:NAME for NAME()."),
]

Sparsity = Annotated[float | None, _setting("sparsity", "Share of zeros in each planned weight.", SPARSE)]
Groups = Annotated[
    str | None,
    _setting("groups", "Number of groups that grow in turn; auto is 4, fewer for a model of fewer blocks.", SPARSE),
]
PartitionOption = Annotated[
    str | None,
    _setting(
        "partition",
        "What makes the groups: blocks (whole blocks, as many in each), params (whole blocks, as many weights in each "
        "as they allow), stages, random, or by-hand (see --group).",
        SPARSE,
    ),
]
GroupGlobs = Annotated[
    list[str] | None,
    _setting("group", "Weights of one group by hand: globs of names joined by |. Once for each group.", SPARSE),
]
PatternOption = Annotated[
    str | None,
    _setting(
        "pattern",
        "Which weights are zero together: unstructured, N:M (2:4), block:RxC (block:4x1: four outputs), or auto: "
        "blocks where they are faster here.",
        SPARSE,
    ),
]
AllocationOption = Annotated[
    str | None,
    _setting(
        "allocation",
        "Sparsity of each weight: uniform, erk by its shape, or global: at each prune one threshold over all "
        "unstructured weights of a group.",
        SPARSE,
    ),
]
Criterion = Annotated[
    str | None,
    _setting("criterion", "What a prune keeps: the largest magnitude, snip (|w dL/dw|), or random.", SPARSE),
]
Dense = Annotated[
    list[str] | None,
    _setting("dense", "Weights that stay dense: a glob of names, or the words first or last. Repeatable.", SPARSE),
]
PruneEmbeddings = Annotated[bool | None, _setting("prune_embeddings", "Prune embeddings too.", SPARSE)]

Method = Annotated[
    str | None,
    _setting(
        "method",
        "gap (grow and prune group by group), gmp (gradual pruning), static (fixed random masks), dense (the control), "
        "or pgap, rgap, acdc, oneshot, imp, set, rigl, st3, snip.",
        SCHEDULE,
    ),
]
Rounds = Annotated[int | None, _setting("rounds", "Turns over all groups.", SCHEDULE)]
PhaseEpochs = Annotated[float | None, _setting("phase_epochs", "Epochs for which a group is dense.", SCHEDULE)]
FinetuneEpochs = Annotated[
    float | None, _setting("finetune_epochs", "Epochs with all masks fixed at the end.", SCHEDULE)
]
StepsPerEpoch = Annotated[
    int | None, _setting("steps_per_epoch", "Length of an epoch, for data without a length.", SCHEDULE)
]
UpdateSteps = Annotated[
    int | None, _setting("update_steps", "Steps between two updates of masks in set and rigl.", SCHEDULE)
]
Replicas = Annotated[
    int | None, _setting("replicas", "Models that pgap trains side by side; 0 is one a group.", SCHEDULE)
]
State = Annotated[
    str | None,
    _setting("state", "Optimizer state at a new phase: reset, carry or auto (carry for gap).", SCHEDULE),
]
PhaseLr = Annotated[
    str | None,
    _setting("phase_lr", "Learning rate at a new phase: restart, continue or auto (continue for gap).", SCHEDULE),
]
Growth = Annotated[
    str | None,
    _setting("growth", "What grown weights start from: zero, or saved, the values before their prune.", SCHEDULE),
]
Landing = Annotated[
    int | None,
    _setting("landing", "Prunes in which a group of gap goes back to its target, further each time.", SCHEDULE),
]
Exchange = Annotated[
    float | None,
    _setting(
        "exchange", "Share of live weights that sparse groups of gap drop and regrow where another one grows.", SCHEDULE
    ),
]
RegrowWarmup = Annotated[
    int | None,
    _setting("regrow_warmup", "Steps over which updates of new weights rise to full size; 0: none.", SCHEDULE),
]

BatchSize = Annotated[int | None, _setting("batch_size", "Samples of an optimizer step, all ranks together.", TRAINING)]
MicroBatch = Annotated[
    int | None,
    _setting("micro_batch", "Samples that a rank takes at once, the rest accumulates; 0: its whole share.", TRAINING),
]
Clip = Annotated[float | None, _setting("clip", "Largest global gradient norm, 0 for none.", TRAINING)]
LrScale = Annotated[float | None, _setting("lr_scale", "Factor of the learning rate of the whole run.", TRAINING)]
Dtype = Annotated[str | None, _setting("dtype", "fp32 or bf16.", TRAINING)]
Seed = Annotated[int | None, _setting("seed", "Seed of everything random.", TRAINING)]
Init = Annotated[
    str | None,
    _setting("init", "Weights to begin with: a run, a .gapfx file, or dense safetensors (file or folder).", TRAINING),
]
Test = Annotated[
    bool | None,
    _setting("test", 'Evaluate on data("test") too, once, at the end.', TRAINING, "--test/--no-test"),
]

Nproc = Annotated[
    int | None, _setting("nproc", "Ranks to start on this machine. Not under torchrun or deepspeed.", MACHINE)
]
Zero = Annotated[
    int | None, _setting("zero", "ZeRO stage: what ranks share out. 1 state, 2 gradients, 3 weights too.", MACHINE)
]
DeepSpeed = Annotated[
    str | None,
    _setting("deepspeed", 'DeepSpeed JSON file; what flags decide may be "auto" in it.', MACHINE),
]
FormOption = Annotated[
    str | None,
    _setting("form", "How a sparse weight is held: compact (live values alone), or masked (whole).", MACHINE),
]
Kernels = Annotated[
    str | None,
    _setting("kernels", "How sparse products run: expand (made dense), sparse (skip zeros), or auto.", MACHINE),
]
Calibrate = Annotated[
    bool | None,
    _setting(
        "calibrate",
        "Measure kernels here before the first run, or take stored break-evens.",
        MACHINE,
        "--calibrate/--no-calibrate",
    ),
]

Out = Annotated[Path | None, _option("Run directory (default runs/TASK-METHOD).", RUN)]
Resume = Annotated[bool, _option("Continue the run in --out, by the same command.", RUN, "--resume")]
Force = Annotated[bool, _option("Replace the run in --out.", RUN, "--force")]
LogEvery = Annotated[int | None, _setting("log_every", "Steps between log lines.", RUN)]
LogTo = Annotated[
    str | None,
    _setting("log_to", "Show events in tensorboard, wandb or both (split by a comma), beside metrics.jsonl.", RUN),
]
EvalEpochs = Annotated[
    float | None, _setting("eval_epochs", "Epochs between evaluations; 0: at phase ends alone.", RUN)
]
CheckpointEvery = Annotated[
    int | None, _setting("checkpoint_every", "Steps between checkpoints; 0: at phase ends and stops alone.", RUN)
]
KeepCheckpoints = Annotated[int | None, _setting("keep_checkpoints", "Checkpoints that are kept.", RUN)]
PlanOption = Annotated[Path | None, _option("Follow this plan.json, of `gapfx plan --json`, edited or not.", RUN)]
Passes = Annotated[str | None, _setting("passes", "Pipeline of the compiler: 'partition{groups=4},insert-masks'.", RUN)]
ShowPasses = Annotated[bool, _option("Show what each pass changed in the graphs.", RUN, "--show-passes")]
Entry = Annotated[str, _option("Name of the model function (default model).", RUN)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")]

InputShapes = Annotated[
    str,
    _option("Shapes of the model's inputs for a task without data: '2x3x224x224', split by commas.", RUN, "--input"),
]
EmitGraph = Annotated[Path | None, _option("Write the graph of the whole model after every pass to this file.", OUTPUT)]
Figure = Annotated[Path | None, _option("Draw the layers with the groups in colours into this SVG file.", OUTPUT)]
PlanJson = Annotated[bool, _option("Print the plan as JSON, for --plan.", OUTPUT, "--json")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON in the place of text.")]

Ranks = Annotated[
    str, _option("Bytes of a rank by kind and phase, traffic and operations, for so many: 1,8,64.", FORECAST)
]
Memory = Annotated[str, _option("With --ranks: the fewest ranks whose memory this is, such as 80GiB.", FORECAST)]
Device = Annotated[
    str,
    _option(
        "With --ranks: computed seconds of a step on a100, h100, h200, here (measured), or FLOPS:BYTES a second.",
        FORECAST,
        "--profile",
    ),
]
OnMeta = Annotated[bool, _option("Build the model without its weights: for models of any size.", FORECAST, "--meta")]

BenchSeconds = Annotated[
    float, typer.Option(help="Time for all of it, about; a compilation that has begun is not broken off.", min=1)
]
