"""Verification of a masked model: its forward against its own plain code on weights that are zeroed by hand.

Half of each planned weight is masked at random. The plain code runs on weights whose masked places are 0, the masked
model on weights whose masked places hold other numbers: a read that escapes its mask shows in what a module returns.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from gapfx.capture import tensors_in
from gapfx.capture.record import eager
from gapfx.capture.state import restored
from gapfx.compiler import Pipeline, Unit, realise
from gapfx.errors import GapfxError, UserError
from gapfx.masks import Masks, bits_of, pack, stored_parameter, write_bits
from gapfx.owners import Owner, in_reads
from gapfx.plan import Form, Plan, Weight
from gapfx.realise import base_of, is_masked, set_aside

# Differences relative to the mean size of what is compared; a read without its mask differs by about 1.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
WEAKER: dict[Form, Form] = {"forward": "read", "read": "in-place"}
ELSEWHERE = 0.1
SEED = 20220425

Run = Callable[[nn.Module], object]


@dataclass(frozen=True)
class _Result:
    """What the module `fqn` returned, tensor by tensor: sums of the values and of their sizes."""

    fqn: str
    sums: tuple[tuple[torch.dtype, float, float, int], ...]


def verify(unit: Unit, rewrites: Pipeline, plan: Plan, run: Run) -> tuple[str, ...]:
    """Demote each owner that does not match, and name it in a note; the model, its weights and masks stay as they are.

    Forms go from "forward" to "read" to "in-place". `rewrites` are applied again to demoted owners; `run` is a forward,
    of a batch that the capture did not see where there is one. A model that gives other numbers each time under one
    seed cannot be verified, which a note says. Raises GapfxError when the model differs in the last form too.
    """
    model = unit.capture.model
    notes: list[str] = []
    with _random_masks(model, plan) as masks:
        wanted = _plain_results(unit, masks, run)
        while True:
            _fill_masked(model, masks, ELSEWHERE)
            found = _results(model, run)
            place = _first_difference(wanted, found)
            if place is None:
                return tuple(notes)
            if _first_difference(wanted, _plain_results(unit, masks, run)) is not None:
                return (*notes, "the model: the same seed gives other numbers, so its masks are not verified")
            notes += _demote(unit, rewrites, place)


def _demote(unit: Unit, rewrites: Pipeline, place: str) -> Iterator[str]:
    """Put the owners that can be the cause of a difference, and all like them, into the next weaker form."""
    suspects = _suspects(unit.owners, place)
    if not suspects:
        raise GapfxError(f"the masked model differs from the model on zeroed weights, first in {place or 'the root'}")
    form = "forward" if any(owner.form == "forward" for owner in suspects) else "read"
    kinds = {base_of(owner.module) for owner in suspects if owner.form == form}
    reason = f"its masked forward differed, in form {form}, from its forward on zeroed weights"
    demoted = [fqn for fqn, owner in unit.owners.items() if owner.form == form and base_of(owner.module) in kinds]
    for fqn in demoted:
        unit.owners[fqn] = in_reads(unit.owners[fqn], WEAKER[form], reason)
    rewrites.run(unit)
    realise(unit)
    return (f"{fqn}: masked in form {WEAKER[form]}, since {reason}" for fqn in demoted)


def _suspects(owners: Mapping[str, Owner], place: str) -> list[Owner]:
    """The owners in a module; all others, such as those of a weight that it reads from outside, where it has none."""
    open_ones = [owner for owner in owners.values() if owner.form in WEAKER and is_masked(owner)]
    inside = [owner for owner in open_ones if not place or f"{owner.fqn}.".startswith(f"{place}.")]
    return inside or open_ones


@contextmanager
def _random_masks(model: nn.Module, plan: Plan) -> Generator[Mapping[str, Tensor]]:
    """Masks that drop an eighth of each weight, half of a small one, in the model meanwhile.

    Afterwards bits and weights are as before.
    """
    generator = torch.Generator().manual_seed(SEED)
    bits = {fqn: bits_of(model, fqn).clone() for weight in plan.weights() for fqn in _names(weight)}
    masks = Masks(model, {weight.fqn: weight.shape for weight in plan.weights()})
    kept: dict[str, Tensor] = {}
    try:
        for weight in plan.weights():
            _write(model, weight, torch.rand(weight.shape, generator=generator) >= _share_dropped(weight))
            # Only what is written over: of a large model there is no room for more.
            kept[weight.fqn] = stored_parameter(model, weight.fqn).detach()[~masks[weight.fqn]]
        yield masks
    finally:
        with torch.no_grad():
            for fqn, value in kept.items():
                stored_parameter(model, fqn).masked_scatter_(~masks[fqn], value)
        for fqn, value in bits.items():
            write_bits(model, fqn, value)


def _share_dropped(weight: Weight) -> float:
    return 0.5 if weight.numel < 4096 else 0.125


def _write(model: nn.Module, weight: Weight, mask: Tensor) -> None:
    for fqn in _names(weight):
        write_bits(model, fqn, pack(mask).to(bits_of(model, fqn).device))


def _names(weight: Weight) -> tuple[str, ...]:
    return (weight.fqn, *weight.aliases)


def _fill_masked(model: nn.Module, masks: Mapping[str, Tensor], value: float) -> None:
    with torch.no_grad():
        for fqn, mask in masks.items():
            stored_parameter(model, fqn).masked_fill_(~mask, value)


def _plain_results(unit: Unit, masks: Mapping[str, Tensor], run: Run) -> list[_Result]:
    _fill_masked(unit.capture.model, masks, 0)
    with set_aside(unit.owners.values()):
        return _results(unit.capture.model, run)


def _results(model: nn.Module, run: Run) -> list[_Result]:
    """What each module returned, in order, and last what `run` did; under one seed."""
    names = {id(module): fqn for fqn, module in reversed(list(model.named_modules()))}
    found: list[_Result] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if id(module) in names:
            found.append(_Result(names[id(module)], _sums(output)))

    hook = register_module_forward_hook(keep)
    try:
        with restored(model), eager():
            # Other numbers than those that were drawn while the forwards of owners were traced.
            torch.manual_seed(SEED)
            random.seed(SEED)
            found.append(_Result("", _sums(run(model))))
    except GapfxError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"the forward that verifies the masks failed: {reason}",
            where=type(model).__name__,
            fix="the model must run on every batch of its data",
        ) from error
    finally:
        hook.remove()
    return found


def _sums(output: object) -> tuple[tuple[torch.dtype, float, float, int], ...]:
    with torch.no_grad():
        return tuple(_sum(tensor) for tensor in tensors_in(output) if tensor.layout == torch.strided)


def _sum(tensor: Tensor) -> tuple[torch.dtype, float, float, int]:
    values = tensor.detach()
    values = values.abs() if values.is_complex() else values
    values = values.double()
    return tensor.dtype, float(values.sum()), float(values.abs().sum()), tensor.numel()


def _first_difference(wanted: list[_Result], found: list[_Result]) -> str | None:
    for one, other in zip(wanted, found, strict=False):
        is_same = one.fqn == other.fqn and len(one.sums) == len(other.sums)
        if not is_same or any(map(_differ, one.sums, other.sums)):
            return other.fqn
    return None if len(wanted) == len(found) else ""


def _differ(one: tuple[torch.dtype, float, float, int], other: tuple[torch.dtype, float, float, int]) -> bool:
    if (one[0], one[3]) != (other[0], other[3]):
        return True
    scale = max(abs(one[2]), abs(other[2]))
    near = TOLERANCE.get(one[0], 1e-4) * scale / math.sqrt(max(1, one[3]))
    return not all(_near(a, b, near) for a, b in zip(one[1:3], other[1:3], strict=True))


def _near(a: float, b: float, difference: float) -> bool:
    return abs(a - b) <= difference if math.isfinite(a) and math.isfinite(b) else str(a) == str(b)
