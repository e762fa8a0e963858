"""From a model to a masked model with a plan: `sparsify`, and the compilation that the command line shares."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from gapfx.calibration.cases import Dtype
from gapfx.calibration.table import LIMIT_SECONDS
from gapfx.calibration.whole import step_seconds
from gapfx.capture import capture, eval_reads
from gapfx.capture.state import collector_paused, restored
from gapfx.compile_notes import notes_of
from gapfx.compiler import Observer, Pass, Pipeline, Rewrite, Unit, Watcher, parse_pipeline, realise
from gapfx.criterion import CRITERIA
from gapfx.errors import PlanError, UserError
from gapfx.lowered import sparse_weights
from gapfx.masks import Masks, bits_of, fill_masked, pack, stored_parameter, unpack, write_bits
from gapfx.ops.expand import dense_of
from gapfx.passes import default_pipeline
from gapfx.passes.allocate_sparsity import AllocateSparsity
from gapfx.passes.choose_kernels import ChooseKernels, KernelChoices
from gapfx.passes.find_weights import FindWeights
from gapfx.passes.insert_masks import InsertMasks
from gapfx.passes.lower_compact import LowerCompact
from gapfx.passes.lower_sparse import LowerSparse
from gapfx.passes.partition import Partition, Strategy
from gapfx.pattern import parse_pattern
from gapfx.plan import Plan
from gapfx.realise import owner_forms
from gapfx.verify import verify

AUTO_GROUPS = 4
AUTO_PATTERN = "auto"  # unstructured, or blocks where their kernels are clearly faster
StrategyName = Strategy
Allocation = Literal["uniform", "erk", "global"]
Form = Literal["masked", "compact"]
Once = Callable[[Callable[[], KernelChoices]], KernelChoices]


@dataclass(frozen=True)
class CompileOptions:
    """What the analyses are asked for. `passes` is a whole pipeline as text and replaces all options but `form` ones.

    With the form "compact" weights may be held by their live values alone, see `gapfx.passes.lower_compact`; `kernels`,
    `calibrate`, for `calibration_seconds` at most, and `dtype` (of the training) then say how their products run, see
    `gapfx.passes.choose_kernels`. With `explain` and `calibrate` a step of the dense model is timed too.
    """

    sparsity: float = 0.9
    groups: int | Literal["auto"] = "auto"
    partition: StrategyName = "blocks"
    globs: tuple[str, ...] = ()
    pattern: str = "unstructured"
    allocation: Allocation = "uniform"
    criterion: str = "magnitude"
    dense: tuple[str, ...] = ()
    prune_embeddings: bool = False
    form: Form = "masked"
    kernels: Literal["auto", "expand", "sparse"] = "expand"
    calibrate: bool = True
    calibration_seconds: float = LIMIT_SECONDS
    dtype: Dtype = "fp32"
    explain: bool = False
    seed: int = 0
    passes: str = ""


@dataclass(frozen=True)
class Compiled:
    """A model whose planned weights are masked (all ones at first), its plan without phases, and what was noted.

    `choices` tell what the kernels of the form "compact" were chosen by; `dense_seconds` are those of a step of the
    model before it was masked, 0 where it was not timed.
    """

    module: nn.Module
    plan: Plan
    notes: tuple[str, ...]
    choices: KernelChoices
    dense_seconds: float = 0.0


def _here(action: Callable[[], KernelChoices]) -> KernelChoices:
    return action()


def compile_model(
    model: nn.Module,
    run: Callable[[nn.Module], object],
    options: CompileOptions,
    *,
    plan: Plan | None = None,
    observer: Observer | None = None,
    watchers: Sequence[Watcher] = (),
    check: Callable[[nn.Module], object] | None = None,
    once: Once = _here,
) -> Compiled:
    """Capture one forward that `run(model)` makes, plan it (or take `plan`), and mask the model in place.

    A second forward, in eval and without gradients, shows which weights other modules read there; a note says so when
    it fails. `watchers` see the unit before the first pass and after each one. `check` is a forward of another batch:
    with it the masked model is verified, and an owner that does not match is demoted and named in a note. `once` runs
    what measures this machine, on one rank for all.
    """
    with collector_paused():
        unit = Unit(capture(model, run), eval_reads(model, run))
        # After the capture: a ScriptModule that has run a few times shows other ops.
        is_timed = options.explain and options.calibrate and options.dtype == "fp32"
        seconds = _dense_seconds(model, run) if is_timed else 0.0
        compiled = _compile(unit, options, plan, Pipeline((), observer, tuple(watchers)), check, once)
        return dataclasses.replace(compiled, dense_seconds=seconds)


def _dense_seconds(model: nn.Module, run: Callable[[nn.Module], object]) -> float:
    try:
        with restored(model):
            return step_seconds(model, run)
    except Exception:  # a plan needs no backward; without it only the layers are compared
        return 0.0


def _compile(
    unit: Unit,
    options: CompileOptions,
    plan: Plan | None,
    watched: Pipeline,
    check: Callable[[nn.Module], object] | None,
    once: Once,
) -> Compiled:
    model = unit.capture.model
    _check_auto_pattern(options)
    if plan is not None:
        _check_rules(plan)
        plan.check_model({fqn: tuple(p.shape) for fqn, p in model.named_parameters(remove_duplicate=False)})
        unit.assume(AllocateSparsity, plan)
        passes: tuple[Pass, ...] = (InsertMasks(),)
    elif options.passes:
        passes = parse_pipeline(options.passes).passes
    else:
        passes = _pipeline(options, unit).passes
    if options.form == "compact" and not any(isinstance(step, LowerCompact) for step in passes):
        passes = (*passes, LowerCompact())
    for watcher in watched.watchers:
        watcher.begin(unit)
    dataclasses.replace(watched, passes=passes).run(unit)
    made = unit.latest(AllocateSparsity)
    _check_masked(unit, made)
    choices = _choose(unit, passes, options, is_planned=plan is not None, once=once)
    dataclasses.replace(watched, passes=(LowerSparse(),) if options.form == "compact" else ()).run(unit)
    notes = notes_of(unit, made)
    if plan is None:
        made = dataclasses.replace(made, criterion=options.criterion)
    module = cast(nn.Module, realise(unit))
    if check is not None:
        rewrites = (*(step for step in passes if isinstance(step, Rewrite)), LowerSparse())
        notes += verify(unit, Pipeline(rewrites), made, check)
    choices = choices.taken(sparse_weights(unit))
    made = dataclasses.replace(choices.on(made), owners=owner_forms(unit.owners))
    return Compiled(module, made, (*notes, *choices.notes), choices)


def _check_auto_pattern(options: CompileOptions) -> None:
    if options.pattern == AUTO_PATTERN and (options.form != "compact" or options.kernels == "expand"):
        raise UserError(
            "the pattern auto goes by the kernels that skip zeros, which are not to be used here",
            fix="take --form compact and --kernels auto, or name a pattern",
        )


def _choose(
    unit: Unit, passes: Sequence[Pass], options: CompileOptions, *, is_planned: bool, once: Once
) -> KernelChoices:
    """What `choose-kernels` finds, on one rank for all, and `lower-sparse` goes by."""
    given = next((step for step in passes if isinstance(step, ChooseKernels)), None)
    if options.form != "compact":
        chooser = ChooseKernels("expand")
    elif is_planned and options.kernels == "auto":
        chooser = ChooseKernels("plan")
    else:
        blocks, limit = options.pattern == AUTO_PATTERN and not is_planned, options.calibration_seconds
        chooser = given or ChooseKernels(options.kernels, options.calibrate, options.dtype, limit, blocks)
    choices = once(lambda: unit.fact(chooser))
    unit.assume(ChooseKernels, choices)
    return choices


def _pipeline(options: CompileOptions, unit: Unit) -> Pipeline:
    find = FindWeights(dense=options.dense, embeddings=options.prune_embeddings)
    pattern = "unstructured" if options.pattern == AUTO_PATTERN else options.pattern
    allocate = AllocateSparsity(options.sparsity, options.allocation, pattern)
    unit.choose(find)
    return default_pipeline(find, _partition(options, unit), allocate)


def _partition(options: CompileOptions, unit: Unit) -> Partition:
    """`auto` takes four groups, or as many as a small model has blocks for."""
    counts = range(AUTO_GROUPS, 1, -1) if options.groups == "auto" else ()
    for count in counts:
        partition = Partition(count, options.partition, options.globs, options.seed)
        try:
            unit.fact(partition)
        except UserError:
            continue
        return partition
    last = 1 if options.groups == "auto" else options.groups
    return Partition(last, options.partition, options.globs, options.seed)


def _check_rules(plan: Plan) -> None:
    """Names in a plan that was edited by hand are found wrong now, not at the first prune."""
    for name in (plan.criterion, plan.start_masks):
        CRITERIA[name]
    for weight in plan.weights():
        refusal = parse_pattern(weight.pattern).refusal(weight.shape)
        if refusal:
            raise PlanError(f"{weight.fqn} cannot have the pattern {weight.pattern}: {refusal}")


def _check_masked(unit: Unit, plan: Plan) -> None:
    """Before kernels are chosen: what no kernel takes can be sparse all the same."""
    refused = dict(unit.refusals)
    for weight in plan.weights():
        if weight.fqn in refused:
            raise UserError(
                f"{weight.fqn} cannot be sparse: {refused[weight.fqn]}", fix="take it out of the plan (--dense)"
            )


@dataclass(frozen=True)
class Sparse:
    """A masked model: `module` is the model that was given, with its forward signature, FQNs and state_dict keys.

    Masked weights are 0 and get no gradient, so that any optimizer that works element by element keeps them 0. `masks`
    maps the FQN of each planned weight to its bool mask of the weight's shape, True = kept; `notes` are the compiler's.
    """

    module: nn.Module
    plan: Plan
    notes: tuple[str, ...] = ()
    masks: Masks = field(init=False)

    def __post_init__(self) -> None:
        """Give access to the module's masks."""
        object.__setattr__(self, "masks", Masks(self.module, {w.fqn: w.shape for w in self.plan.weights()}))

    def set_mask(self, fqn: str, mask: Tensor) -> None:
        """Put another mask (bool, the weight's shape, True = kept) on a planned weight and zero what it drops.

        What was dropped before and is kept now starts at 0. Raises UserError for a weight that is not planned, and for
        a mask of another shape or type.
        """
        weight = next((item for item in self.plan.weights() if item.fqn == fqn), None)
        if weight is None:
            raise UserError(f"{fqn!r} is no planned weight", fix="`masks` lists the planned weights")
        if tuple(mask.shape) != weight.shape or mask.dtype != torch.bool:
            raise UserError(f"the mask of {fqn} must be a bool tensor of shape {list(weight.shape)}")
        for name in (fqn, *weight.aliases):
            write_bits(self.module, name, pack(mask).to(bits_of(self.module, name).device))
        fill_masked(stored_parameter(self.module, fqn), mask)

    def dense_state_dict(self) -> dict[str, Tensor]:
        """Copies under the original keys, exact zeros where a weight is masked."""
        return dense_state_dict(self.module, self.plan)


def dense_state_dict(module: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Copies of a masked module's state under its original keys, exact zeros where a weight is masked."""
    # What `get_extra_state` of a module gives may be anything.
    state = {
        key: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for key, value in module.state_dict().items()
    }
    for weight in plan.weights():
        bits = bits_of(module, weight.fqn)
        for fqn in (weight.fqn, *weight.aliases):
            if state[fqn].shape == weight.shape:
                fill_masked(state[fqn], unpack(bits, weight.shape))
            else:
                state[fqn] = dense_of(state[fqn], bits, weight.shape)
    return state


def _call(args: Sequence[Any], kwargs: Mapping[str, Any], model: nn.Module) -> object:
    return model(*args, **kwargs)


def sparsify(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    sparsity: float = 0.9,
    groups: int | Literal["auto"] = "auto",
    partition: StrategyName | Sequence[str] = "blocks",
    pattern: str = "unstructured",
    allocation: Allocation = "uniform",
    form: Literal["masked"] = "masked",
    dense: Sequence[str] = (),
    criterion: str = "magnitude",
    seed: int = 0,
    plan: Plan | None = None,
) -> Sparse:
    """Mask `model` in place and give it back with its plan; `model(*args, **kwargs)` must run.

    The masks keep what `criterion` ("magnitude" or "random") scores highest at the target `sparsity`, the share of
    zeros, of each weight. `groups` is their number, or "auto": four, fewer for a model of fewer blocks. `partition` is
    a strategy, or one glob a group, several patterns in it joined by "|". `pattern` is "unstructured", "N:M" or
    "block:RxC". `dense` are globs of weights that stay dense; the words `first` and `last` name the first and the last
    prunable weight. `plan` is used as it is in place of the options. `seed` draws the scores of "random".

    Nothing is trained, and the plan has no phases (`with_schedule` adds them).

    Raises UserError with the reason for anything that cannot be done.
    """
    if form != "masked":
        raise UserError(f"form {form!r} is not supported yet", fix='use form="masked"')
    by_hand = not isinstance(partition, str)
    options = CompileOptions(
        sparsity=sparsity,
        groups=groups,
        partition="by-hand" if by_hand else cast(StrategyName, partition),
        globs=tuple(partition) if by_hand else (),
        pattern=pattern,
        allocation=allocation,
        criterion=criterion if criterion in CRITERIA else "magnitude",
        dense=tuple(dense),
        seed=seed,
    )
    score = CRITERIA[criterion]
    run = partial(_call, args, kwargs or {})
    compiled = compile_model(model, run, options, plan=plan, check=run)
    sparse = Sparse(compiled.module, compiled.plan, compiled.notes)
    generator = torch.Generator().manual_seed(seed)
    for weight in compiled.plan.weights():
        value = stored_parameter(model, weight.fqn)
        sparse.set_mask(weight.fqn, parse_pattern(weight.pattern).mask(score(value, generator), weight.sparsity))
    return sparse
