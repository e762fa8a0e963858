"""What a plan's kernels should do to a step of the whole model, from the times of its layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from gapfx.calibration import Times, answer
from gapfx.calibration.table import SMALLEST_WORK, better
from gapfx.passes.choose_kernels import Choice, KernelChoices
from gapfx.pattern import parse_pattern
from gapfx.plan import Plan

BLOCKS = "block:4x1"
LEAST_GAIN = 1.05
NOTHING_TO_GAIN = "no speed-up is to be expected: every planned layer is too small, or no sparse kernel takes it"
NOT_KNOWN = "no stored figure promises a speed-up on this device; without --no-calibrate it is measured"


@dataclass(frozen=True)
class Expectation:
    """Seconds of forward and backward: of the dense model, of a phase with one group dense, and of one without any.

    `layers` are those of the dense planned layers; where the whole model was not timed, `dense` is that too.
    """

    dense: float
    layers: float
    one_group: float
    sparse: float
    num_groups: int

    @property
    def gains(self) -> tuple[float, float]:
        """Speed-ups with one group dense and with none."""
        return self.dense / self.one_group, self.dense / self.sparse


def expect(plan: Plan, choices: Mapping[str, Choice], dense_seconds: float = 0.0) -> Expectation | None:
    """What to expect; None where no layer was timed. `dense_seconds`: of a step of the dense model, 0 for not known."""
    timed = {fqn: choice for fqn, choice in choices.items() if choice.times is not None}
    if not timed:
        return None
    before = {fqn: choice.times.dense for fqn, choice in timed.items() if choice.times}
    after = {fqn: choice.times.of(choice.kernel) for fqn, choice in timed.items() if choice.times}
    layers, sparse = sum(before.values()), sum(after.values())
    rest = max(0.0, dense_seconds - layers)
    lost = sum(before[fqn] - after[fqn] for fqn in timed) / len(plan.groups)  # the mean over groups
    return Expectation(rest + layers, layers, rest + sparse + lost, rest + sparse, len(plan.groups))


def why_nothing(choices: Mapping[str, Choice]) -> str:
    """What to say where no layer was measured and none is to skip its zeros."""
    open_cases = (case for choice in choices.values() if not choice.reason for case in choice.cases)
    return NOT_KNOWN if any(case.work >= SMALLEST_WORK for case in open_cases) else NOTHING_TO_GAIN


def with_blocks(plan: Plan, choices: KernelChoices, *, calibrate: bool) -> dict[str, Choice]:
    """The choices if blocks of four outputs were kept or dropped together, where the shape allows it."""
    fits = {w.fqn for w in plan.weights() if w.pattern != BLOCKS and parse_pattern(BLOCKS).refusal(w.shape) is None}
    cases = {
        fqn: tuple(dataclasses.replace(case, pattern=BLOCKS) for case in choice.cases)
        for fqn, choice in choices.by_weight.items()
        if fqn in fits and choice.cases and not choice.reason
    }
    found = answer([case for some in cases.values() for case in some], calibrate=calibrate)
    blocks: dict[str, Choice] = {}
    for fqn, some in cases.items():
        times = _total([found.times[case] for case in some])
        blocks[fqn] = Choice(better(times), some, times)
    return {**choices.by_weight, **blocks} if blocks else {}


def describe(expected: Expectation, blocks: Expectation | None, *, is_measured: bool, is_whole: bool) -> str:
    """One or two lines that a person can act on."""
    what = "a step" if is_whole else "the planned layers"
    source = "measured here" if is_measured else "from stored figures"
    share = f", {expected.layers / expected.dense:.0%} of the dense step is in planned layers" if is_whole else ""
    lines = [f"expected of {what}, forward and backward, {source}: {_gains(expected)}{share}"]
    if max(expected.gains) < LEAST_GAIN:
        lines = [f"no speed-up of {what} is to be expected on this device with this plan ({_gains(expected)}{share})"]
    if blocks is not None and blocks.gains[1] > LEAST_GAIN * expected.gains[1]:
        lines.append(f"with --pattern {BLOCKS}: {_gains(blocks)}")
    return "".join(f"{line}\n" for line in lines)


def _gains(expected: Expectation) -> str:
    one, every = expected.gains
    if expected.num_groups == 1:
        return f"{every:.2f}x as fast as dense with all sparse"
    return f"{one:.2f}x as fast as dense with one of {expected.num_groups} groups dense, {every:.2f}x with all sparse"


def _total(times: list[Times]) -> Times:
    return sum(times[1:], times[0])
