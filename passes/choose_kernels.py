"""choose-kernels: how the products of each frozen weight run, by what each way takes on this machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from gapfx.calibration import Answers, Case, Times, answer
from gapfx.calibration.cases import Dtype
from gapfx.calibration.refusals import refusal
from gapfx.calibration.table import LIMIT_SECONDS, better
from gapfx.compiler import Analysis, Unit, register
from gapfx.lowered import cases_of
from gapfx.passes.allocate_sparsity import AllocateSparsity
from gapfx.pattern import parse_pattern
from gapfx.plan import Kernel, Plan, Weight

# Blocks along outputs, whose weights a kernel reads together: finer ones first.
BLOCKS = ("block:4x1", "block:16x1")
# Of the time with the finer pattern: a coarser one has less freedom in what it keeps, so it has to win clearly.
LEAST_BLOCK_WIN = 0.8
NOT_TAKEN = "its layer is masked in a form without a product"
Mode = Literal["auto", "expand", "sparse", "plan"]


@dataclass(frozen=True)
class Choice:
    """The kernel of one weight; `cases` are its places in the model, `times` those of all of them together.

    Without times nothing was compared. `reason` says why no sparse kernel takes the weight, "" when one does.
    `pattern` takes the place of the plan's, "" leaves it.
    """

    kernel: Kernel
    cases: tuple[Case, ...] = ()
    times: Times | None = None
    is_measured: bool = False
    reason: str = ""
    pattern: str = ""

    def on(self, weight: Weight) -> Weight:
        """The weight of the plan with this choice and what is expected of it."""
        if self.times is None and self.kernel == weight.kernel:
            return weight
        gain = self.times.dense / self.times.of(self.kernel) if self.times else 1.0
        positions = sum(case.positions for case in self.cases)
        pattern = self.pattern or weight.pattern
        return dataclasses.replace(
            weight, kernel=self.kernel, gain=round(gain, 2), positions=positions, pattern=pattern
        )

    def wins_over(self, finer: Choice) -> bool:
        """Whether this one, of a coarser pattern, is worth what the pattern takes away."""
        if self.kernel != "sparse" or self.times is None or finer.times is None:
            return False
        return self.times.of(self.kernel) < LEAST_BLOCK_WIN * finer.times.of(finer.kernel)


@dataclass(frozen=True)
class KernelChoices:
    """The choice of every planned weight by FQN, and notes for people. `is_everywhere`: sparse ones were asked for."""

    by_weight: Mapping[str, Choice]
    notes: tuple[str, ...] = ()
    is_everywhere: bool = False

    def taken(self, sparse: Container[str]) -> KernelChoices:
        """The choices as far as they took effect: `sparse` are the weights whose zeros are skipped."""
        by_weight = {
            fqn: dataclasses.replace(choice, kernel="expand", reason=choice.reason or NOT_TAKEN, pattern="")
            if choice.kernel == "sparse" and fqn not in sparse
            else choice
            for fqn, choice in self.by_weight.items()
        }
        return dataclasses.replace(self, by_weight=by_weight)

    def on(self, plan: Plan) -> Plan:
        """The plan with the choices."""
        groups = tuple(
            dataclasses.replace(group, weights=tuple(self.by_weight[w.fqn].on(w) for w in group.weights))
            for group in plan.groups
        )
        return dataclasses.replace(plan, groups=groups)


@register
@dataclass(frozen=True)
class ChooseKernels(Analysis[KernelChoices]):
    """Densify + GEMM or kernels that skip zeros, for each weight whose product `lower-compact` has replaced.

    `auto` takes what is faster in forward and backward together, measured at the sizes of the capture, for
    `limit_seconds` at most; without `calibrate` stored break-evens decide. `expand` and `sparse` take that everywhere,
    `plan` what the plan says; all as far as a kernel takes the weight. With `blocks` an unstructured weight gets blocks
    of 4 or 16 outputs where its kernel is a fifth faster with them.
    """

    name: ClassVar[str] = "choose-kernels"
    mode: Mode = "auto"
    calibrate: bool = True
    dtype: Dtype = "fp32"
    limit_seconds: float = LIMIT_SECONDS
    blocks: bool = False

    def compute(self, unit: Unit) -> KernelChoices:
        """Of the plan's weights. Measures, unless it was measured before."""
        weights = list(unit.latest(AllocateSparsity).weights())
        cases = cases_of(unit, weights, self.dtype)
        if self.mode in ("expand", "plan"):
            return KernelChoices({w.fqn: self._as_told(w, cases.get(w.fqn, ())) for w in weights})
        ways = {w.fqn: self._patterns(w, cases.get(w.fqn, ())) for w in weights}
        wanted = [case for each in ways.values() for some in each.values() for case in some]
        answers = answer(wanted, calibrate=self.calibrate, limit_seconds=self.limit_seconds)
        choices = {fqn: self._best_pattern(each, answers) for fqn, each in ways.items()}
        return KernelChoices(choices, answers.notes, is_everywhere=self.mode == "sparse")

    def _as_told(self, weight: Weight, cases: tuple[Case, ...]) -> Choice:
        reason = _reason(cases)
        is_sparse = self.mode == "plan" and weight.kernel == "sparse" and not reason
        return Choice("sparse" if is_sparse else "expand", cases, reason=reason)

    def _patterns(self, weight: Weight, cases: tuple[Case, ...]) -> dict[str, tuple[Case, ...]]:
        """Cases by the pattern that they would have, that of the plan, named "", first."""
        blocks = BLOCKS if self.blocks and weight.pattern == "unstructured" and cases and not _reason(cases) else ()
        fitting = [pattern for pattern in blocks if parse_pattern(pattern).refusal(weight.shape) is None]
        others = {p: tuple(dataclasses.replace(case, pattern=p) for case in cases) for p in fitting}
        return {"": cases, **others}

    def _best_pattern(self, ways: Mapping[str, tuple[Case, ...]], answers: Answers) -> Choice:
        best = self._best(ways[""], answers)
        for pattern, cases in ways.items():
            choice = dataclasses.replace(self._best(cases, answers), pattern=pattern)
            best = choice if pattern and choice.wins_over(best) else best
        return best

    def _best(self, cases: tuple[Case, ...], answers: Answers) -> Choice:
        reason = _reason(cases)
        if not cases:
            return Choice("expand", reason=reason)
        each = [answers.times[case] for case in cases]
        times = sum(each[1:], each[0])
        kernel = "expand" if reason else "sparse" if self.mode == "sparse" else better(times)
        return Choice(kernel, cases, times, set(cases) <= answers.measured, reason)


def _reason(cases: tuple[Case, ...]) -> str:
    if not cases:
        return "no product, or none that stands in the forward of the module that holds it"
    return next(filter(None, map(refusal, cases)), "")
