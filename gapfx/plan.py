"""The Plan: plain data that the compiler writes and the runtime follows.

A plan can be printed, saved as JSON, edited by hand and given back. It holds no tensor and no code.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gapfx.errors import PlanError
from gapfx.typed_json import parse

SCHEMA_VERSION = 1

StateRule = Literal["reset", "carry"]
LrRule = Literal["restart", "continue"]
RegrowRule = Literal["random", "gradient"]
GrowthRule = Literal["zero", "saved"]
SoftenRule = Literal["no", "ramp", "hold"]
Form = Literal["forward", "read", "in-place"]
Kernel = Literal["expand", "sparse"]


@dataclass(frozen=True)
class Weight:
    """One prunable parameter: its target `sparsity` (share of zeros) and the pattern of its mask.

    `aliases` are the other FQNs of the same parameter (tied weights). `kernel` says how its products run while it is
    frozen and held by its live values: made dense first, or skipping zeros. `gain` is the speed-up of forward and
    backward over a dense weight that was expected of it, at `positions` rows of the product or positions of the output
    over the batch; 0 where nothing was expected.
    """

    fqn: str
    shape: tuple[int, ...]
    sparsity: float
    pattern: str = "unstructured"
    aliases: tuple[str, ...] = ()
    kernel: Kernel = "expand"
    gain: float = 1.0
    positions: int = 0

    @property
    def numel(self) -> int:
        """Number of elements of the dense parameter."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Group:
    """Weights that grow to dense together."""

    name: str
    weights: tuple[Weight, ...]

    @property
    def numel(self) -> int:
        """Number of elements of all its dense parameters."""
        return sum(weight.numel for weight in self.weights)


@dataclass(frozen=True)
class DenseWeight:
    """A parameter with two or more dimensions that stays dense, and why."""

    fqn: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class OwnerForm:
    """A module that holds planned weights, its class, and how they are masked.

    Form: in its own forward, at their reads, or in place; `reason` says why not in the forward.
    """

    fqn: str
    kind: str
    form: Form
    reason: str = ""


@dataclass(frozen=True)
class Phase:
    """Training steps `start <= step < stop` with one fixed set of masks.

    Before the first step the groups in `grow` become dense; after the last one the groups in `prune` go back to
    their target sparsity. Groups are indices into `Plan.groups`. `state` and `lr` say what the optimizer state and
    the learning rate do when the phase begins. With more than one of `replicas`, each of them trains a model of its own
    from the same start: replica r grows and prunes every `replicas`-th group from the r-th on, and they are merged.
    A prune goes to `depth` times the target sparsity, in (0, 1].

    Before the first step each weight that does not grow drops the `drop` share of its live values that are smallest in
    magnitude, and as many masked ones become live at 0: drawn at random, or those with the largest gradient of the
    first step's batch.

    Weights that grow start at 0, or, where `growth` says so, at the values that their last prune has taken. With `keep`
    all weights are kept aside after the last step, before the prune; with `rewind` they go back to that before the
    first. `soften` lets forwards see the weights of grown groups through a soft threshold, straight through to their
    gradients: at a sparsity that rises to the target over the phase, or at the target (see gapfx.runtime.soften).

    A learning rate that restarts goes through a schedule of `lr_steps`, 0 for as many as the phase has, from its step
    `lr_skip` on: so a training can end early, or go on from the middle of another.
    """

    name: str
    start: int
    stop: int
    grow: tuple[int, ...] = ()
    prune: tuple[int, ...] = ()
    round: int = 0
    state: StateRule = "reset"
    lr: LrRule = "restart"
    lr_skip: int = 0
    lr_steps: int = 0
    replicas: int = 1
    depth: float = 1.0
    drop: float = 0.0
    regrow: RegrowRule = "random"
    growth: GrowthRule = "zero"
    keep: bool = False
    rewind: bool = False
    soften: SoftenRule = "no"

    def grown_by(self, replica: int) -> tuple[int, ...]:
        """Groups that become dense in one replica."""
        return self.grow[replica :: self.replicas]

    @property
    def num_steps(self) -> int:
        """Optimizer steps in this phase."""
        return self.stop - self.start


@dataclass(frozen=True)
class Plan:
    """Ordered groups, the target sparsity of each weight, what stays dense, and the phases of the run.

    `start_masks` and `criterion` name the criteria that make the masks before the first phase and at each prune.
    Groups that the first phase grows are not masked before it. With the allocation "global" a prune keeps the highest
    scores of a whole group, and the sparsity of each weight is where it starts; weights with a pattern, and those named
    in `own_sparsity`, keep their own. `owners` tells how the weights were masked when the plan
    was made; a plan that is used again does not ask for it.
    """

    groups: tuple[Group, ...]
    dense: tuple[DenseWeight, ...] = ()
    phases: tuple[Phase, ...] = ()
    method: str = "gap"
    sparsity: float = 0.0
    partition: str = "by-hand"
    allocation: str = "uniform"
    criterion: str = "magnitude"
    start_masks: str = "random"
    owners: tuple[OwnerForm, ...] = ()
    own_sparsity: tuple[str, ...] = ()
    schema_version: int = field(default=SCHEMA_VERSION)

    def weights(self) -> Iterator[Weight]:
        """Every prunable weight, group by group."""
        for group in self.groups:
            yield from group.weights

    def in_place(self) -> frozenset[str]:
        """Weights that are masked in place in one of the modules that hold them."""
        homes = {owner.fqn for owner in self.owners if owner.form == "in-place"}
        return frozenset(
            weight.fqn
            for weight in self.weights()
            if any(_is_below(fqn, home) for fqn in (weight.fqn, *weight.aliases) for home in homes)
        )

    def pools(self, group: Group) -> tuple[tuple[Weight, ...], ...]:
        """The weights of a group by what a prune compares: each with itself alone, or several with one another.

        One threshold over several (see `allocation`) keeps as many weights as they have planned together.
        """
        if self.allocation != "global":
            return tuple((weight,) for weight in group.weights)
        is_free = {w.fqn: w.pattern == "unstructured" and w.fqn not in self.own_sparsity for w in group.weights}
        together = tuple(weight for weight in group.weights if is_free[weight.fqn])
        alone = tuple((weight,) for weight in group.weights if not is_free[weight.fqn])
        return (together, *alone) if together else alone

    def eased(self, index: int) -> Plan:
        """The plan with the sparsity in force from the end of phase `index` on, where prunes do not go all the way."""
        depths: dict[int, float] = {}
        for phase in self.phases[: index + 1]:
            depths |= dict.fromkeys(phase.prune, phase.depth)
        if all(depth == 1 for depth in depths.values()):
            return self
        groups = (_eased(group, depths.get(number, 1.0)) for number, group in enumerate(self.groups))
        return dataclasses.replace(self, groups=tuple(groups))

    def group_of(self) -> dict[str, int]:
        """FQN -> index of its group."""
        return {weight.fqn: index for index, group in enumerate(self.groups) for weight in group.weights}

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.phases[-1].stop if self.phases else 0

    def to_json(self) -> str:
        """The plan as JSON text; `Plan.from_json` gives an equal plan back."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @staticmethod
    def from_json(text: str, *, source: str = "the plan") -> Plan:
        """Parse and validate a plan. Raises PlanError that names the place in `source`."""
        try:
            plan: Plan = parse(Plan, json.loads(text), source)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{source} is not JSON: {error}", fix="write it again with `gapfx plan --json`") from error
        plan.validate(source=source)
        return plan

    @staticmethod
    def load(path: Path) -> Plan:
        """The plan in a file such as plan.json, validated. Raises PlanError that names the file and the place."""
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"the plan {path} cannot be read: {error}", fix="give the path of a plan.json") from error
        return Plan.from_json(text, source=str(path))

    def validate(self, *, source: str = "the plan") -> None:
        """Raise PlanError unless groups are disjoint and the phases tile the steps."""
        if self.schema_version != SCHEMA_VERSION:
            raise PlanError(
                f"{source} has schema version {self.schema_version}, this gapfx reads {SCHEMA_VERSION}",
                fix="make the plan again with `gapfx plan --json`",
            )
        _check_weights(self, source)
        _check_phases(self, source)

    def check_model(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise PlanError unless every planned weight is a parameter of the model with the same shape."""
        for weight in self.weights():
            for fqn in (weight.fqn, *weight.aliases):
                if fqn not in shapes:
                    raise PlanError(
                        f"the plan is for another model: it has no parameter {fqn!r}",
                        fix="make a plan for this model with `gapfx plan TASK --json`",
                    )
                if tuple(shapes[fqn]) != weight.shape:
                    raise PlanError(
                        f"the plan is for another model: {fqn} has shape {list(shapes[fqn])}, "
                        f"the plan says {list(weight.shape)}",
                        fix="make a plan for this model with `gapfx plan TASK --json`",
                    )


def _eased(group: Group, depth: float) -> Group:
    weights = (dataclasses.replace(weight, sparsity=depth * weight.sparsity) for weight in group.weights)
    return dataclasses.replace(group, weights=tuple(weights))


def _check_weights(plan: Plan, source: str) -> None:
    seen: dict[str, str] = {}
    for index, group in enumerate(plan.groups):
        where = f"{source}: groups[{index}] ({group.name})"
        if not group.weights:
            raise PlanError("a group has no weights", where=where, fix="delete the group or give it weights")
        for weight in group.weights:
            if not 0 <= weight.sparsity < 1:
                raise PlanError(
                    f"sparsity {weight.sparsity} of {weight.fqn} is not in [0, 1)",
                    where=where,
                    fix="sparsity is the share of zeros, such as 0.9",
                )
            if any(size <= 0 for size in weight.shape):
                raise PlanError(f"{weight.fqn} has shape {list(weight.shape)}", where=where, fix="sizes are positive")
            for fqn in (weight.fqn, *weight.aliases):
                if fqn in seen:
                    raise PlanError(
                        f"{fqn} is twice in the plan, in groups {seen[fqn]!r} and {group.name!r}",
                        where=where,
                        fix="a weight belongs to one group",
                    )
                seen[fqn] = group.name
    unknown = sorted(set(plan.own_sparsity) - {weight.fqn for weight in plan.weights()})
    if unknown:
        where = f"{source}: own_sparsity"
        raise PlanError(f"there is no weight {unknown[0]!r}", where=where, fix="name weights of the groups")


def _check_phases(plan: Plan, source: str) -> None:
    step = 0
    for index, phase in enumerate(plan.phases):
        where = f"{source}: phases[{index}] ({phase.name})"
        if phase.start != step or phase.stop <= phase.start:
            raise PlanError(
                f"the phase covers steps [{phase.start}, {phase.stop}), expected a start of {step} and a later stop",
                where=where,
                fix="phases tile the steps without gaps",
            )
        if phase.replicas != 1 and not (phase.grow == phase.prune and 1 < phase.replicas <= len(set(phase.grow))):
            raise PlanError(
                f"{phase.replicas} replicas cannot grow {list(phase.grow)} and prune {list(phase.prune)}",
                where=where,
                fix="each replica grows groups of its own and prunes the same ones",
            )
        if not 0 <= phase.lr_skip <= (phase.lr_steps or phase.num_steps) - phase.num_steps:
            raise PlanError(
                f"{phase.num_steps} steps from step {phase.lr_skip} of the learning rate's schedule on are not in it",
                where=where,
                fix="lr_steps is at least lr_skip and the steps of the phase together, or both are 0",
            )
        if not 0 < phase.depth <= 1:
            raise PlanError(f"depth {phase.depth} is not in (0, 1]", where=where, fix="1 prunes to the target sparsity")
        if not 0 <= phase.drop < 1 or (phase.drop and phase.replicas > 1):
            raise PlanError(
                f"{phase.replicas} replicas cannot drop {phase.drop} of their live weights",
                where=where,
                fix="drop is a share in [0, 1), and 0 with more than one replica",
            )
        if phase.replicas > 1 and (phase.growth, phase.keep, phase.rewind, phase.soften) != (
            "zero",
            False,
            False,
            "no",
        ):
            raise PlanError(
                "replicas cannot keep weights aside, take them back or soften them",
                where=where,
                fix='with more than one replica growth is "zero", soften "no", keep and rewind false',
            )
        if phase.rewind and not any(earlier.keep for earlier in plan.phases[:index]):
            raise PlanError("no weights were kept aside to go back to", where=where, fix="set keep in an earlier phase")
        wrong = [group for group in (*phase.grow, *phase.prune) if not 0 <= group < len(plan.groups)]
        if wrong:
            raise PlanError(f"group {wrong[0]} does not exist", where=where, fix=f"there are {len(plan.groups)} groups")
        step = phase.stop


def _is_below(fqn: str, module: str) -> bool:
    return not module or fqn.startswith(f"{module}.")
