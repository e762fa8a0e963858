"""Accelerate: the loop of plain_loop.py on one or more ranks, with checkpoints from which it goes on.

    python examples/accelerate_loop.py --out runs/accelerate
    accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py --out runs/accelerate
    python examples/accelerate_loop.py --out runs/accelerate --steps 400 --resume

`gapfx.hold` takes the model and the optimizer that `prepare` gives back. Registered for checkpointing, the masks are
part of what `save_state` writes, and `load_state` refuses a checkpoint without them. DeepSpeed and FSDP1 inside of
Accelerate keep weights of their own, which hooks do not reach.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import fashion
import torch
from accelerate import Accelerator
from plain_loop import accuracy, plan_of
from torch.utils.data import DataLoader

import gapfx


def train(out: Path, steps: int, sparsity: float, *, is_resumed: bool = False) -> None:
    """Train to `steps`, from the start or from the checkpoint in `out`, and write a checkpoint there."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    net, plan = fashion.model(), plan_of(300, sparsity)  # the phases stay as they are when a run becomes longer
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(fashion.data("train"), 64 // accelerator.num_processes, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    held = gapfx.hold(model, optimizer, plan=plan)
    accelerator.register_for_checkpointing(held)
    if is_resumed:
        accelerator.load_state(str(out))
        accelerator.print(f"goes on from step {held.num_steps}, sparsity {held.sparsity:.3f}")
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))
    for batch in itertools.islice(epochs, max(0, steps - held.num_steps)):
        optimizer.zero_grad()
        loss = fashion.loss(model, batch)
        accelerator.backward(loss)
        optimizer.step()
        if held.num_steps % 50 == 0:
            accelerator.print(f"step {held.num_steps}: loss {loss.item():.3f}, sparsity {held.sparsity:.3f}")
    accelerator.save_state(str(out))
    score = accuracy(net)
    accelerator.print(f"sparsity {held.sparsity:.3f}, accuracy {score:.3f}")
    accelerator.end_training()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args()
    train(given.out, given.steps, given.sparsity, is_resumed=given.resume)


if __name__ == "__main__":
    main()
