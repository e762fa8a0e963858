"""Compact against masked runs and against plain torch: worlds 1, 2, 4, ZeRO 1 to 3, fp32 and bf16, over six phases.

    python tools/parity.py
    python tools/parity.py --worlds 1 --worlds 2 --checkpointed
    python tools/parity.py --worlds 1 --kernels sparse

A GPT of three blocks is trained by cyclic GaP, two rounds over three groups, in micro-batches that are accumulated,
with gradient clipping; with --checkpointed its blocks are recomputed in the backward. Plain torch is a loop of a few
lines on one process: masked weights, masked gradients, torch's AdamW; it takes masks, order of data and learning rates
from gapfx and nothing else. One line a setting: differences from plain torch for both forms, and between the forms
without clipping, where both add up in the same order unless kernels skip zeros or gloo adds in another order.

Differences are: the largest of a step's loss; of the weights that live in both, the largest and the root of the mean
square; how many weights live in one alone. AdamW divides by the root of the mean square of the gradient: where a
gradient is no larger than its own rounding, its rounding alone moves the weight by up to the learning rate a step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file
from torch import Tensor

from gapfx.commands import Source
from gapfx.masks import unpack
from gapfx.plan import Phase, Plan
from gapfx.runtime.feed import to_model
from gapfx.runtime.grow_prune import grow, layout_of, prune, start_masks
from gapfx.runtime.learning_rate import factor_at, warmup_cosine
from gapfx.runtime.state import TrainState, live_slice, whole
from gapfx.training import build_model, make_feed

ROOT = Path(__file__).parent.parent
LR = 3e-3
TASK = """
import sys
sys.path.insert(0, {root!r})
import torch
from torch.utils.checkpoint import checkpoint
from tools.bench_memory import Gpt, loss_of, samples
class Model(Gpt):
    def forward(self, tokens):
        x = self.tokens(tokens) + self.places
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if {checkpointed} and self.training else block(x)
        return self.head(self.norm(x))
def model(): return Model(3, 64, 32)
def data(split): return samples(32, 64 if split == "train" else 4)
loss = loss_of
def optimizer(params): return torch.optim.AdamW(params, lr={lr})
defaults = dict(groups=3, rounds=2, sparsity=0.8, phase_epochs=0.5, finetune_epochs=0.0, eval_epochs=0.0,
                batch_size=16, micro_batch=2, log_every=1, state="carry", kernels={kernels!r})
"""


def run(task: Path, out: Path, world: int, *flags: object) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of all steps, and the exported weights."""
    command = [sys.executable, "-m", "gapfx", "sparsify", task, "--out", out, "--nproc", world, *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{result.stderr[-2000:]}")
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if event["event"] == "step"], load_file(out / "model.safetensors")


def plain(task: Path, plan: Plan, clip: float, dtype: torch.dtype) -> tuple[list[float], dict[str, Tensor]]:
    """The same by a loop of plain torch in one process, fp32 master weights beside a model in `dtype`."""
    loaded, settings = Source(str(task), "", {}).load()
    model, feed = build_model(loaded, settings), make_feed(loaded, settings, 0, 1)
    masters = {fqn: p.detach().clone().requires_grad_() for fqn, p in model.named_parameters()}
    model.to(dtype)
    state = TrainState(layout_of({fqn: tuple(p.shape) for fqn, p in masters.items()}, plan), {})
    optimizer, losses = torch.optim.AdamW(masters.values(), lr=LR), list[float]()
    keep(state, masters)
    start_masks(state, plan, settings.seed)
    for phase in plan.phases:
        grow(state, plan, phase.grow)
        show(state, masters, optimizer)
        masks = {fqn: unpack(bits, masters[fqn].shape) for fqn, bits in state.bits.items()}
        for offset, batches in enumerate(feed.steps(phase.start, phase.stop)):
            losses.append(step(model, masters, masks, optimizer, batches, phase, offset, plan.num_steps, clip))
        keep(state, masters)
        state.step = phase.stop
        prune(state, plan, phase.prune, settings.seed)
    return losses, {fqn: whole(state, state.weights, fqn) for fqn in masters}


def step(
    model: torch.nn.Module,
    masters: dict[str, Tensor],
    masks: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    batches: object,
    phase: Phase,
    offset: int,
    num_steps: int,
    clip: float,
) -> float:
    """One optimizer step; the mean loss."""
    found: list[float] = []
    with torch.no_grad():
        for fqn, parameter in model.named_parameters():
            parameter.copy_(masters[fqn])
            parameter.grad = None
    for batch in batches:  # pyright: ignore[reportGeneralTypeIssues]
        value = loss_of(model, to_model(batch, torch.device("cpu"), None))
        (value / 8).backward()
        found.append(value.item())
    for fqn, parameter in model.named_parameters():
        grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        masters[fqn].grad = grad.float() * masks.get(fqn, torch.tensor(1.0))
    if clip:
        torch.nn.utils.clip_grad_norm_(masters.values(), clip)
    optimizer.param_groups[0]["lr"] = LR * factor_at(phase.start + offset, phase, num_steps, warmup_cosine)
    optimizer.step()
    return sum(found) / len(found)


def loss_of(model: torch.nn.Module, batch: Tensor) -> Tensor:
    """The task's."""
    scores = model(batch[:, :-1]).flatten(0, 1)
    return torch.nn.functional.cross_entropy(scores, batch[:, 1:].flatten())


@torch.no_grad()
def keep(state: TrainState, masters: dict[str, Tensor]) -> None:
    """Put the weights into the state."""
    for fqn, value in masters.items():
        state.weights[fqn] = live_slice(value.detach().flatten(), state.bits.get(fqn))


@torch.no_grad()
def show(state: TrainState, masters: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Take the weights of the state; moments of what is masked are forgotten."""
    for fqn, value in masters.items():
        value.copy_(whole(state, state.weights, fqn))
        if fqn in state.bits:
            mask = unpack(state.sparse_bits[fqn], value.shape)
            for key in ("exp_avg", "exp_avg_sq"):
                if key in optimizer.state[value]:
                    optimizer.state[value][key].mul_(mask)


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> str:
    """Of weights that live in both the largest and the root of the mean square; how many live in one alone."""
    ours, theirs = (torch.cat([weights[fqn].float().flatten() for fqn in other]) for weights in (one, other))
    both = (ours != 0) & (theirs != 0)
    apart = (ours - theirs)[both]
    return f"{apart.abs().max():8.1e} {apart.square().mean().sqrt():8.1e} {int(((ours != 0) ^ (theirs != 0)).sum()):4}"


def main(
    worlds: Annotated[list[int] | None, typer.Option(help="Numbers of ranks.")] = None,
    checkpointed: Annotated[bool, typer.Option("--checkpointed", help="Recompute blocks in the backward.")] = False,
    clip: Annotated[float, typer.Option(help="Largest gradient norm in the comparison with plain torch.")] = 0.2,
    kernels: Annotated[str, typer.Option(help="How the compact form multiplies: expand, sparse or auto.")] = "expand",
) -> None:
    """Print the table."""
    kept = "recomputed" if checkpointed else "kept"
    print(f"clip {clip}, micro-batches of 2 of 16, blocks {kept}, kernels {kernels}")
    print(
        "dtype world zero | compact - plain: loss, weight, rms, in one alone | masked - plain: the same |"
        " compact - masked without clip"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task = folder / "task.py"
        task.write_text(TASK.format(root=str(ROOT), checkpointed=checkpointed, lr=LR, kernels=kernels))
        for dtype in ("fp32", "bf16"):
            run(task, folder / f"plan-{dtype}", 1, "--dtype", dtype)
            made = Plan.load(folder / f"plan-{dtype}" / "plan.json")
            wanted = plain(task, made, clip, torch.bfloat16 if dtype == "bf16" else torch.float32)
            for world in worlds or [1, 2, 4]:
                for zero in (1, 2, 3):
                    line(task, folder / f"{dtype}-{world}-{zero}", (dtype, world, zero), clip, wanted)


def line(
    task: Path, folder: Path, setting: tuple[str, int, int], clip: float, wanted: tuple[list[float], dict[str, Tensor]]
) -> None:
    """One row of the table."""
    dtype, world, zero = setting
    flags = ("--dtype", dtype, "--zero", zero)
    parts = [f"{dtype:5} {world:5} {zero:4} "]
    for form in ("compact", "masked"):
        losses, weights = run(task, folder / form, world, *flags, "--form", form, "--clip", clip)
        apart = max(abs(a - b) for a, b in zip(losses, wanted[0], strict=True))
        parts.append(f"{apart:10.1e} {difference(weights, wanted[1])} ")
    pair = [
        run(task, folder / f"{form}-0", world, *flags, "--form", form, "--clip", 0) for form in ("compact", "masked")
    ]
    same = pair[0][0] == pair[1][0] and all(torch.equal(pair[0][1][fqn], pair[1][1][fqn]) for fqn in pair[0][1])
    parts.append(" same bits" if same else f" {difference(pair[0][1], pair[1][1])}")
    print("|".join(parts), flush=True)


if __name__ == "__main__":
    typer.run(main)
