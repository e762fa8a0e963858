"""Flags and arguments of the command line, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TaskArgument = Annotated[str, typer.Argument(help="Task file, a Python file with model(), data() and loss().")]
Sparsity = Annotated[float | None, typer.Option(help="Share of zeros in each planned weight, such as 0.9.")]
Groups = Annotated[str | None, typer.Option(help="Number of groups that grow in turn, or auto.")]
PartitionOption = Annotated[str | None, typer.Option(help="blocks, params, stages, random or by-hand.")]
GroupGlobs = Annotated[list[str] | None, typer.Option(help="Weights of one group by hand, globs joined by |.")]
PatternOption = Annotated[
    str | None, typer.Option(help="unstructured, N:M (2:4), block:RxC (block:4x1), or auto: by what is faster here.")
]
AllocationOption = Annotated[
    str | None,
    typer.Option(
        help="Sparsity of each weight: uniform, erk by its shape, or global: at each prune one threshold over all "
        "unstructured weights of a group."
    ),
]
Dense = Annotated[list[str] | None, typer.Option(help="Weights that stay dense: globs, or first, or last.")]
PruneEmbeddings = Annotated[bool | None, typer.Option(help="Prune embeddings too.")]
Method = Annotated[
    str | None, typer.Option(help="gap, pgap, rgap, acdc, gmp, oneshot, imp, set, rigl, st3, snip, static or dense.")
]
Replicas = Annotated[int | None, typer.Option(help="Models that pgap trains side by side; one a group by default.")]
Rounds = Annotated[int | None, typer.Option(help="Turns over all groups.")]
PhaseEpochs = Annotated[float | None, typer.Option(help="Epochs for which a group is dense.")]
FinetuneEpochs = Annotated[float | None, typer.Option(help="Epochs with all masks fixed at the end.")]
UpdateSteps = Annotated[int | None, typer.Option(help="Steps between two updates of masks in set and rigl.")]
StepsPerEpoch = Annotated[int | None, typer.Option(help="For data without a length.")]
BatchSize = Annotated[int | None, typer.Option(help="Samples of an optimizer step over all ranks.")]
MicroBatch = Annotated[int | None, typer.Option(help="Samples a rank takes at once; the rest is accumulated.")]
Kernels = Annotated[
    str | None, typer.Option(help="How sparse products run: expand (made dense), sparse (skips zeros), or auto.")
]
Calibrate = Annotated[
    bool | None, typer.Option("--calibrate/--no-calibrate", help="Measure kernels here, or take stored break-evens.")
]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.")]
PlanOption = Annotated[Path | None, typer.Option(help="Use this plan.json, edited by hand for example.")]
Passes = Annotated[str | None, typer.Option(help="Pipeline as text: 'partition{groups=4},insert-masks'.")]
ShowPasses = Annotated[bool, typer.Option("--show-passes", help="Show what each pass changed in the graphs.")]
BenchSeconds = Annotated[
    float, typer.Option(help="Time for all of it, about; a compilation that has begun is not broken off.", min=1)
]
PhaseLr = Annotated[
    str | None, typer.Option(help="Learning rate at a new phase of gap, pgap and oneshot: restart or continue.")
]
Growth = Annotated[
    str | None, typer.Option(help="What grown weights start from: zero, or saved, the values before their prune.")
]
Test = Annotated[bool | None, typer.Option("--test/--no-test", help='Evaluate on data("test") too, once, at the end.')]
Init = Annotated[
    str | None, typer.Option(help="Weights to begin with: a run, a .gapfx file, or dense safetensors (file or folder).")
]
LogTo = Annotated[
    str | None, typer.Option(help="Show events in tensorboard, wandb or both (split by a comma), beside metrics.jsonl.")
]
Ranks = Annotated[str, typer.Option(help="Tell bytes of a rank, traffic and operations for so many: 1,8,64.")]
Memory = Annotated[str, typer.Option(help="With --ranks: the fewest ranks whose memory this is, such as 80GiB.")]
Device = Annotated[
    str,
    typer.Option(
        "--profile",
        help="With --ranks: seconds of a step on a100, h100, h200, here (measured) or FLOPS:BYTES a second.",
    ),
]
OnMeta = Annotated[bool, typer.Option("--meta", help="Build the model without its weights: for models of any size.")]
Zero = Annotated[int | None, typer.Option(help="ZeRO stage, 0 to 3; 3 shards the weights too.")]
Dtype = Annotated[str | None, typer.Option(help="fp32 or bf16.")]
FormOption = Annotated[
    str | None, typer.Option(help="How a sparse weight is held: compact (live values alone), or masked.")
]
InputShapes = Annotated[
    str, typer.Option("--input", help="Shapes of the model's inputs for a task without data: '2x3x224x224'.")
]
Landing = Annotated[
    int | None, typer.Option(help="Prunes in which a group of gap goes back to its target, further each time.")
]
RegrowWarmup = Annotated[
    int | None, typer.Option(help="Steps over which updates of newly grown weights rise to full size, 0 for none.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")]
