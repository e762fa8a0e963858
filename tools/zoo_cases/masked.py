"""Random masks, the model that has them by gapfx, and the reference that has them by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gapfx.compiler import Unit
from gapfx.masks import pack, stored_parameter, write_bits
from gapfx.passes.find_blocks import Block, FindBlocks
from gapfx.passes.partition import Partition
from gapfx.plan import Plan
from gapfx.sparse import Compiled, CompileOptions, compile_model
from tools.zoo_cases.cases import Inputs
from tools.zoo_cases.running import NotRunnable, Outcome, seed_all, train_call

SPARSITY = 0.5
Masks = Mapping[str, Tensor]


class BlockWatch:
    """Keeps the blocks that a compilation finds: it asks before the model is masked."""

    def __init__(self) -> None:
        self.blocks: tuple[Block, ...] = ()

    def begin(self, unit: Unit) -> None:
        """Nothing is known yet."""

    def after(self, name: str, unit: Unit) -> None:
        """Ask once the weights are in groups."""
        if name == Partition.name:
            self.blocks = unit.latest(FindBlocks)


def compiled(
    model: nn.Module, inputs: Inputs, *watchers: BlockWatch, check: Callable[[nn.Module], object] | None = None
) -> Compiled:
    """The model captured, planned and masked in place, all masks ones; verified by the forward `check`, if any."""
    seed_all(1)
    options = CompileOptions(sparsity=SPARSITY)
    return compile_model(model, lambda m: m(*inputs.args, **inputs.kwargs), options, watchers=watchers, check=check)


def random_masks(plan: Plan) -> dict[str, Tensor]:
    """Bool masks that keep about half; a weight norm needs something left of each row."""
    generator = torch.Generator().manual_seed(7)
    masks: dict[str, Tensor] = {}
    for weight in plan.weights():
        mask = torch.rand(weight.shape, generator=generator) < 1 - SPARSITY
        rows = mask.view(weight.shape[0], -1)
        rows[torch.arange(len(rows)), torch.randint(rows.shape[1], (len(rows),), generator=generator)] = True
        masks[weight.fqn] = mask
    return masks


def put_on(masked: nn.Module, plan: Plan, masks: Masks) -> None:
    """Give the masked model these masks, and zeros where they drop."""
    for weight in plan.weights():
        for fqn in (weight.fqn, *weight.aliases):
            write_bits(masked, fqn, pack(masks[weight.fqn]))
        with torch.no_grad():
            stored_parameter(masked, weight.fqn).masked_fill_(~masks[weight.fqn], 0)


def by_hand(reference: nn.Module, masks: Masks) -> None:
    """Multiply the weights of a plain model by their masks, in place."""
    with torch.no_grad():
        for fqn, parameter in reference.named_parameters():
            if fqn in masks:
                parameter.masked_fill_(~masks[fqn], 0)


def by_name(model: nn.Module, names: Mapping[str, object]) -> dict[str, nn.Parameter]:
    """The stored parameters of a model under these names."""
    return {fqn: stored_parameter(model, fqn) for fqn in names}


@dataclass(frozen=True)
class Pair:
    """The masked model and the reference, run side by side."""

    masked: nn.Module
    reference: nn.Module
    masks: Masks

    def train(self, model: nn.Module, inputs: Inputs) -> Outcome:
        """A training call; the reference's gradients are masked by hand."""
        parameters = by_name(model, dict(self.reference.named_parameters()))
        hand = {fqn: mask.to(torch.float32) for fqn, mask in self.masks.items()} if model is self.reference else {}
        return train_call(model, parameters, inputs, hand)

    def both(self, run: Callable[[nn.Module], Outcome]) -> tuple[Outcome, Outcome]:
        """What `run` gives for the masked model and for the reference. Raises NotRunnable where the latter fails."""
        try:
            theirs = run(self.reference)
        except Exception as error:
            raise NotRunnable(f"{type(error).__name__}: {error}") from error
        return run(self.masked), theirs
