"""What `gapfx plan --ranks` prints: bytes of a rank by phase and kind, for numbers of ranks, and what fits a memory."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from gapfx.activations import Activations
from gapfx.device_profile import Profile, parse_profile
from gapfx.errors import UserError
from gapfx.estimate import (
    PhaseEstimate,
    Setup,
    Sizes,
    check_setup,
    dense_estimate,
    dense_plan,
    estimate,
    smallest_ranks,
    step_seconds,
)
from gapfx.flops import ForwardFlops, training_flops
from gapfx.plan import Plan
from gapfx.quantities import format_bytes, format_count, format_seconds, format_share
from gapfx.text import table_text

_UNITS = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_BAR = 30


@dataclass(frozen=True)
class Question:
    """What is asked: numbers of ranks, a memory in bytes (0 for none), and a device (None for none)."""

    ranks: tuple[int, ...]
    memory: float = 0.0
    profile: Profile | None = None

    @staticmethod
    def parse(ranks: str, memory: str, profile: str, dtype: torch.dtype = torch.float32) -> Question:
        """From the flags. Raises UserError for a text that is none of them."""
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", ranks):
            raise UserError(f"cannot read the ranks {ranks!r}", fix="write numbers split by commas: --ranks 8,64")
        bytes_of_memory = parse_bytes(memory)
        found = parse_profile(profile, dtype) if profile else None
        return Question(tuple(map(int, ranks.split(","))), bytes_of_memory, found)


def parse_bytes(text: str) -> float:
    """Bytes that a text such as 80GiB names; 0 for no text. Raises UserError for a text without number and unit."""
    if not text:
        return 0.0
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    if not found or found[2].upper() not in _UNITS:
        raise UserError(f"cannot read the memory {text!r}", fix="write a number with its unit: --memory 80GiB")
    return float(found[1]) * _UNITS[found[2].upper()]


def describe(
    plan: Plan,
    sizes: Sizes,
    setup: Setup,
    question: Question,
    forward: ForwardFlops | None,
    activations: Activations | None,
) -> str:
    """Tables and a picture as text."""
    setups = [dataclasses.replace(setup, ranks=ranks) for ranks in question.ranks]
    for each in setups:
        check_setup(each)
    return "\n".join(part for part in _parts(plan, sizes, setups, question, forward, activations) if part)


def _parts(
    plan: Plan,
    sizes: Sizes,
    setups: Sequence[Setup],
    question: Question,
    forward: ForwardFlops | None,
    activations: Activations | None,
) -> Iterator[str]:
    first = list(estimate(plan, sizes, setups[0]))
    yield f"model state of a rank of {setups[0].ranks}, ZeRO {setups[0].zero}:"
    yield _phase_table(first)
    yield _picture(first, dense_estimate(plan, sizes, setups[0]))
    yield _rank_table(plan, sizes, setups)
    if activations is not None:
        yield _activation_line(setups, activations)
    if question.memory:
        yield _what_fits(plan, sizes, setups[0], question.memory)
    if forward is not None and activations is not None:
        yield _operations_line(plan, setups, forward, activations)
        yield from _times(plan, sizes, setups, question, forward, activations)


def _phase_table(estimates: Sequence[PhaseEstimate]) -> str:
    kinds = ["values", "masks", "gradients", "masters", "moments", "buckets"]
    kinds += ["aside"] * any(each.rank.aside for each in estimates)
    has_scoring = any(each.scoring for each in estimates)
    head = ["phase", "live", *kinds, "state", "densified", "traffic", *["scoring before"] * has_scoring]
    rows = [
        [
            each.phase.name,
            format_share(each.live),
            *(format_bytes(getattr(each.rank, kind)) for kind in kinds),
            format_bytes(each.rank.state),
            format_bytes(each.rank.densified),
            format_bytes(each.traffic),
            *([format_bytes(each.scoring) if each.scoring else "-"] if has_scoring else []),
        ]
        for each in _unlike(estimates)
    ]
    return table_text(head, rows, right=set(range(1, len(head))))


def _unlike(estimates: Sequence[PhaseEstimate]) -> Iterator[PhaseEstimate]:
    """Without those that are like an earlier one but for the round."""
    seen: set[tuple[object, ...]] = set()
    for each in estimates:
        key = (each.phase.grow, round(each.live, 6), each.rank, each.scoring)
        if key not in seen:
            seen.add(key)
            yield each


def _picture(estimates: Sequence[PhaseEstimate], dense: PhaseEstimate) -> str:
    """A bar a phase, as long as its share of the state of dense training."""
    width = max(len(each.phase.name) for each in (*estimates, dense))
    lines = [
        f"{each.phase.name:<{width}}  {'#' * max(1, round(_BAR * each.rank.state / dense.rank.state)):<{_BAR}}  "
        f"{each.rank.state / dense.rank.state:.2f} of dense"
        for each in (*_unlike(estimates), dense)
    ]
    return "\n".join(lines) + "\n"


def _rank_table(plan: Plan, sizes: Sizes, setups: Sequence[Setup]) -> str:
    head = ["ranks", "peak state, sparse", "dense", "sparse over dense", "traffic a step", "dense"]
    rows: list[list[str]] = []
    for setup in setups:
        sparse = list(estimate(plan, sizes, setup))
        peak, dense = max(each.peak for each in sparse), dense_estimate(plan, sizes, setup)
        ratio = peak / dense.rank.state
        sent = max(each.traffic for each in sparse)
        states = [format_bytes(peak), format_bytes(dense.rank.state)]
        rows.append([str(setup.ranks), *states, f"{ratio:.2f}", format_bytes(sent), format_bytes(dense.traffic)])
    return table_text(head, rows, right=set(range(1, len(head))))


def _activation_line(setups: Sequence[Setup], activations: Activations) -> str:
    """Sparse or dense they are the same: a layer keeps its input, whatever its weight is."""
    told = ", ".join(f"{format_bytes(activations.of_rank(each.ranks))} on {each.ranks:,}" for each in setups)
    return f"activations of a micro-batch, beside the state, as this device keeps them for the backward: {told} ranks\n"


def _what_fits(plan: Plan, sizes: Sizes, setup: Setup, memory: float) -> str:
    plain = dataclasses.replace(setup, has_masks=False, is_compact=False)
    sparse = smallest_ranks(plan, sizes, setup, memory)
    dense = smallest_ranks(dense_plan(plan), sizes, plain, memory)
    told = [f"{ranks:,} ranks" if ranks else "no number of ranks" for ranks in (sparse, dense)]
    return f"{format_bytes(memory)} a rank hold the model state of {told[0]} sparse, {told[1]} dense (powers of two)\n"


def _operations_line(plan: Plan, setups: Sequence[Setup], forward: ForwardFlops, activations: Activations) -> str:
    """Of all steps, each on a rank's share of the batch."""
    dense, sparse = training_flops(dense_plan(plan), forward), training_flops(plan, forward)
    shares = [(each.ranks, activations.forwards(each.ranks)) for each in setups]
    told = (f"{format_count(dense * n)} and {format_count(sparse * n)} on {ranks:,}" for ranks, n in shares)
    return f"operations of a rank's training, dense and counted for the sparse form: {', '.join(told)} ranks"


def _times(
    plan: Plan,
    sizes: Sizes,
    setups: Sequence[Setup],
    question: Question,
    forward: ForwardFlops,
    activations: Activations,
) -> Iterator[str]:
    for setup in setups if question.profile else ():
        assert question.profile is not None
        estimates, forwards = list(estimate(plan, sizes, setup)), activations.forwards(setup.ranks)
        seconds = step_seconds(plan, forward, estimates, question.profile, forwards)
        yield (
            f"{setup.ranks} ranks like {question.profile.name}, the batch of {activations.batch} shared: "
            f"{format_seconds(seconds)} a step with dense products and nothing hidden"
        )
