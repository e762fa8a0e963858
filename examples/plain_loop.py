"""Your own training loop: plain PyTorch that grows and prunes by `gapfx.hold`, on the images of fashion.py.

    python examples/plain_loop.py
    python examples/plain_loop.py --mask

The loop is an ordinary one. `gapfx.hold` hooks the parameters and the optimizer, the model stays as it is. With a plan
groups grow and are pruned in turn; with `--mask` one mask, of the largest initial weights, holds from start to end.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator

import fashion
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import gapfx

GROUPS = 3


def plan_of(steps: int, sparsity: float) -> gapfx.Plan:
    """Half of the steps to grow and prune each group once, half with fixed masks."""
    # On a model of its own, as sparsify() puts mask ops into the model that it is given.
    found = gapfx.sparsify(fashion.model(), (torch.randn(2, 1, 28, 28),), sparsity=sparsity, groups=GROUPS).plan
    phase_steps = steps // (2 * GROUPS)
    return gapfx.with_schedule(found, "gap", gapfx.Budget(1, phase_steps, steps - GROUPS * phase_steps))


def largest(model: nn.Module, plan: gapfx.Plan) -> dict[str, Tensor]:
    """Masks of the planned weights that keep their largest values."""
    masks: dict[str, Tensor] = {}
    for weight in plan.weights():
        size = model.get_parameter(weight.fqn).detach().abs()
        masks[weight.fqn] = size > size.flatten().kthvalue(round(weight.sparsity * weight.numel)).values
    return masks


def batches(batch_size: int) -> Iterator[fashion.Batch]:
    """Batches of training images, epoch after epoch."""
    loader = DataLoader(fashion.data("train"), batch_size, shuffle=True, drop_last=True)
    return itertools.chain.from_iterable(itertools.repeat(loader))


def train(steps: int, sparsity: float, *, is_masked: bool = False) -> tuple[nn.Module, gapfx.Held]:
    """The trained model, and its masks."""
    torch.manual_seed(0)
    model, plan = fashion.model(), plan_of(steps, sparsity)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    if is_masked:
        held = gapfx.hold(model, optimizer, masks=largest(model, plan))
    else:
        held = gapfx.hold(model, optimizer, plan=plan)
    for step, batch in enumerate(itertools.islice(batches(64), steps), start=1):
        optimizer.zero_grad()
        loss = fashion.loss(model, batch)
        loss.backward()
        optimizer.step()
        if step % max(1, steps // 6) == 0:
            print(f"step {step}: loss {loss.item():.3f}, sparsity {held.sparsity:.3f}")
    return model, held


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """On the images that are held out."""
    return fashion.evaluate(model.eval(), DataLoader(fashion.data("val"), 500))["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--mask", action="store_true", help="hold one mask instead of growing and pruning")
    given = parser.parse_args()
    model, held = train(given.steps, given.sparsity, is_masked=given.mask)
    print(f"sparsity {held.sparsity:.3f}, accuracy {accuracy(model):.3f}")


if __name__ == "__main__":
    main()
