"""Running a model once under a seed, by hand-made masks or without, and comparing what came out."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gapfx.capture import tensors_in
from tools.zoo_cases.cases import Inputs

TOLERANCE = 1e-5
# A model that does not repeat itself may differ by what it differs from itself, times this, up to a limit.
SLACK = 10
VARIES_AT_MOST = 1e-3
STEP_SIZE = 0.05


class NotRunnable(Exception):
    """The plain model does not do what a check needs."""


@dataclass(frozen=True)
class Outcome:
    """Numbers of one call by name: `out.N` for outputs, `loss`, `grad.FQN`, `step.FQN` after one step, `buffer.FQN`."""

    values: Mapping[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """The worst disagreement of two outcomes: relative to max(1, largest value) of its tensor, and where it is."""

    worst: float = 0.0
    where: str = ""
    num_nan: int = 0

    def is_equal(self, varies: float = 0.0) -> bool:
        """Whether every number agrees within the tolerance of the zoo; `varies` is how far the plain model strays."""
        return self.worst <= max(TOLERANCE, min(SLACK * varies, VARIES_AT_MOST))


def seed_all(seed: int) -> None:
    """Seed every generator that models draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def loss_of(outputs: list[Tensor]) -> Tensor:
    """A scalar that every floating output that is attached to the graph takes part in.

    Raises ValueError when there is none.
    """
    attached = [out for out in outputs if out.requires_grad and out.is_floating_point()]
    if not attached:
        raise ValueError("no floating output is attached to a parameter")
    parts = [torch.where(out.isfinite(), out, torch.zeros_like(out)).float() for out in attached]
    return torch.stack([part.square().mean() + (part * _ramp(part)).mean() for part in parts if part.numel()]).sum()


def train_call(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    inputs: Inputs,
    masks: Mapping[str, Tensor],
    seed: int = 1,
    buffers_of: nn.Module | None = None,
) -> Outcome:
    """One forward, backward and step of gradient descent; gradients are multiplied by `masks` (float, by FQN).

    The step goes into copies: the parameters of the model stay as they are, and so do its gradients (none).
    """
    seed_all(seed)
    outputs = tensors_in(model(*inputs.args, **inputs.kwargs))
    loss = loss_of(outputs)
    loss.backward()
    values = {f"out.{index}": out.detach().clone() for index, out in enumerate(outputs)}
    values["loss"] = loss.detach()
    for fqn, parameter in parameters.items():
        if parameter.grad is None:
            continue
        grad = parameter.grad.detach().to_dense() if parameter.grad.is_sparse else parameter.grad.detach()
        grad = grad * masks[fqn] if fqn in masks else grad
        values[f"grad.{fqn}"] = grad.clone()
        values[f"step.{fqn}"] = parameter.detach() - STEP_SIZE * grad
        parameter.grad = None
    named = (buffers_of or model).named_buffers()
    values |= {f"buffer.{fqn}": buffer.detach().clone() for fqn, buffer in named if "_gapfx_" not in fqn}
    return Outcome(values)


def eval_call(model: nn.Module, inputs: Inputs, seed: int = 1) -> Outcome:
    """Outputs of one forward in eval, without gradients; the model is back in its mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    seed_all(seed)
    try:
        with torch.no_grad():
            outputs = tensors_in(model(*inputs.args, **inputs.kwargs))
    finally:
        for module, training in modes:
            module.training = training
    return Outcome({f"out.{index}": out.clone() for index, out in enumerate(outputs)})


def compare(ours: Outcome, theirs: Outcome) -> Difference:
    """The worst difference; a value that only one has, another shape or another dtype is infinitely far."""
    if list(ours.values) != list(theirs.values):
        odd = sorted(set(ours.values) ^ set(theirs.values))
        return Difference(float("inf"), f"only one side has {', '.join(odd[:3]) or 'this order'}")
    worst = Difference()
    for name, one in ours.values.items():
        found = _distance(one, theirs.values[name])
        num_nan = worst.num_nan + int(one.isnan().sum())
        worst = (
            Difference(found, name, num_nan) if found > worst.worst else Difference(worst.worst, worst.where, num_nan)
        )
    return worst


def _distance(one: Tensor, two: Tensor) -> float:
    if one.shape != two.shape or one.dtype != two.dtype:
        return float("inf")
    if torch.equal(one, two) or not one.numel():
        return 0.0
    kind = torch.complex128 if one.is_complex() else torch.float64
    one, two = one.to(kind), two.to(kind)
    same = (one == two) | (one.isnan() & two.isnan())
    gap = torch.where(same, torch.zeros_like(one), one - two).abs()
    if not bool(gap.isfinite().all()):
        return float("inf")
    finite = two[two.isfinite()].abs()
    return float(gap.max()) / max(1.0, float(finite.max()) if finite.numel() else 1.0)


def _ramp(part: Tensor) -> Tensor:
    return torch.linspace(-1, 1, max(part.numel(), 1), dtype=part.dtype, device=part.device).view(part.shape)
