"""The checks of a case: what gapfx makes of a model against the same model with masks multiplied in by hand."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gapfx.capture import capture, capture_eval, outline, tensors_in
from gapfx.masks import pack, stored_parameter, write_bits
from gapfx.plan import Plan
from gapfx.sparse import CompileOptions, compile_model
from tools.zoo_cases.cases import Case, Inputs
from tools.zoo_cases.running import Difference, Outcome, compare, eval_call, seed_all, train_call

CHECKS = ("outline", "capture", "partition", "train", "eval", "batch", "keys")
SPARSITY = 0.5
Masks = Mapping[str, Tensor]


class NotRunnable(Exception):
    """The plain model does not run a forward and a backward."""


@dataclass
class Result:
    """What happened to one case: `failures` by check, with the cause; `facts` are numbers for the table."""

    key: str
    family: str
    status: str = "passed"
    failures: dict[str, str] = field(default_factory=dict[str, str])
    facts: dict[str, Any] = field(default_factory=dict[str, Any])

    def fail(self, check: str, cause: str) -> None:
        """Remember the first cause for which a check failed."""
        self.failures.setdefault(check, cause)
        self.status = "failed"


def check(case: Case) -> Result:
    """Run every check of a case; an error of gapfx is a failure, an error of the plain model is `not runnable`."""
    result = Result(case.key, case.family)
    try:
        plain, inputs = _built(case)
        eager = _eager(plain, inputs, result)
    except NotRunnable as error:
        result.status = "not runnable"
        result.failures["eager"] = str(error)
        return result
    _attempt("outline", result, lambda: _check_outline(plain, inputs, eager, result))
    keys = list(plain.state_dict())
    plan = _attempt("capture", result, lambda: _compiled(plain, inputs, result))
    if plan is None:
        return result
    _check_partition(plan, result)
    if list(plain.state_dict()) != keys:
        result.fail("keys", "the keys of state_dict changed")
    if not result.facts["weights"]:
        return result
    _attempt("train", result, lambda: _check_masked(case, plain, plan, inputs, eager, result))
    return result


def _attempt(check: str, result: Result, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except Exception as error:
        result.fail(check, f"{type(error).__name__}: {error}")
        return None


def _built(case: Case) -> tuple[nn.Module, Inputs]:
    seed_all(0)
    try:
        return case.build().train(), case.batch(case.batch_sizes[0])
    except Exception as error:
        raise NotRunnable(f"{type(error).__name__}: {error}") from error


def _eager(model: nn.Module, inputs: Inputs, result: Result) -> Difference:
    """By how much two runs of the plain model under one seed differ; buffers are put back after each."""
    parameters = dict(model.named_parameters())
    buffers = {fqn: buffer.clone() for fqn, buffer in model.named_buffers()}
    runs: list[Outcome] = []
    try:
        for _ in range(2):
            began = time.perf_counter()
            runs.append(train_call(model, parameters, inputs, {}))
            result.facts["eager_seconds"] = time.perf_counter() - began
            put_back(model, buffers)
        seed_all(1)
        began = time.perf_counter()
        model(*inputs.args, **inputs.kwargs)
        result.facts["forward_seconds"] = time.perf_counter() - began
        put_back(model, buffers)
    except Exception as error:
        raise NotRunnable(f"{type(error).__name__}: {error}") from error
    difference = compare(*runs)
    if difference.worst:
        result.facts["varies"] = f"{difference.worst:.1e} at {difference.where}"
    return difference


def _check_outline(model: nn.Module, inputs: Inputs, eager: Difference, result: Result) -> None:
    """The outline of recordings in train and in eval against the plain model."""

    def run(module: nn.Module) -> Any:
        return module(*inputs.args, **inputs.kwargs)

    seed_all(1)
    tree = outline(capture(model, run), capture_eval(model, run))
    parameters = dict(model.named_parameters())
    buffers = {fqn: buffer.clone() for fqn, buffer in model.named_buffers()}
    replayed = Inputs(tuple(tensors_in((inputs.args, inputs.kwargs))))
    outcomes: list[Outcome] = []
    for module, given in ((model, inputs), (tree, replayed)):
        outcomes.append(train_call(module, parameters, given, {}, buffers_of=model))
        put_back(model, buffers)
    _judge("outline", compare(outcomes[1], outcomes[0]), eager, result)
    modes = [eval_call(module, given) for module, given in ((tree, replayed), (model, inputs))]
    put_back(model, buffers)
    _judge("outline eval", compare(*modes), eager, result)


def _judge(check: str, difference: Difference, eager: Difference, result: Result) -> None:
    """A failure when two outcomes differ by more than the tolerance, and by more than eager does from itself."""
    result.facts[f"{check}_bits"] = difference.worst == 0
    if difference.num_nan:
        result.facts[f"{check}_nan"] = difference.num_nan
    if not difference.is_equal and difference.worst > 10 * eager.worst:
        result.fail(check, f"differs by {difference.worst:.1e} at {difference.where}")


def put_back(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Give the buffers their values again."""
    with torch.no_grad():
        for fqn, buffer in model.named_buffers():
            if fqn in buffers and buffer.shape == buffers[fqn].shape:
                buffer.copy_(buffers[fqn])


def _compiled(model: nn.Module, inputs: Inputs, result: Result) -> Plan:
    """The plan of the model, which is masked in place."""
    seed_all(1)
    options = CompileOptions(sparsity=SPARSITY)
    began = time.perf_counter()
    compiled = compile_model(model, lambda m: m(*inputs.args, **inputs.kwargs), options)
    result.facts["compile_seconds"] = time.perf_counter() - began
    plan = compiled.plan
    result.facts |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights": sum(1 for _ in plan.weights()),
        "groups": len(plan.groups),
        "dense": len(plan.dense),
        "notes": len(compiled.notes),
    }
    return plan


def _check_partition(plan: Plan, result: Result) -> None:
    names = [weight.fqn for weight in plan.weights()]
    if not names:
        reasons = sorted({weight.reason for weight in plan.dense})
        result.fail("partition", f"no prunable weight was found ({'; '.join(reasons[:3]) or 'no matrix at all'})")
    if len(names) != len(set(names)):
        result.fail("partition", "a weight is in two groups")
    if any(not group.weights for group in plan.groups):
        result.fail("partition", "a group is empty")


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


def _check_masked(case: Case, masked: nn.Module, plan: Plan, inputs: Inputs, eager: Difference, result: Result) -> None:
    """Training, evaluation and another batch size against a second build with masks multiplied in by hand."""
    masks = random_masks(plan)
    reference, _ = _built(case)
    _check_same_build(reference, masked)
    by_hand(reference, masks)
    for weight in plan.weights():
        for fqn in (weight.fqn, *weight.aliases):
            write_bits(masked, fqn, pack(masks[weight.fqn]))
        with torch.no_grad():
            stored_parameter(masked, weight.fqn).masked_fill_(~masks[weight.fqn], 0)
    pair = _Pair(masked, reference, masks, eager, result)
    pair.check("train", lambda model, hand: pair.train(model, inputs, hand))
    pair.check("eval", lambda model, _: eval_call(model, inputs))
    seed_all(2)
    other = case.batch(case.batch_sizes[1])
    pair.check("batch", lambda model, hand: pair.train(model, other, hand))


def _check_same_build(reference: nn.Module, masked: nn.Module) -> None:
    for fqn, parameter in reference.named_parameters():
        if not torch.equal(parameter, stored_parameter(masked, fqn)):
            raise NotRunnable(f"two builds under one seed differ in {fqn}")


def by_hand(reference: nn.Module, masks: Masks) -> None:
    """Multiply the weights of a plain model by their masks, in place."""
    with torch.no_grad():
        for fqn, parameter in reference.named_parameters():
            if fqn in masks:
                parameter.masked_fill_(~masks[fqn], 0)


@dataclass
class _Pair:
    """The masked model and the reference, run side by side."""

    masked: nn.Module
    reference: nn.Module
    masks: Masks
    eager: Difference
    result: Result

    def train(self, model: nn.Module, inputs: Inputs, is_by_hand: bool) -> Outcome:
        """A training call; the reference's gradients are masked by hand."""
        parameters = {fqn: stored_parameter(model, fqn) for fqn, _ in self.reference.named_parameters()}
        floats = {fqn: mask.to(torch.float32) for fqn, mask in self.masks.items()} if is_by_hand else {}
        return train_call(model, parameters, inputs, floats)

    def check(self, name: str, run: Callable[[nn.Module, bool], Outcome]) -> None:
        """Run both, and note whether they agree to the bit."""
        try:
            theirs = run(self.reference, True)
        except Exception as error:
            self.result.facts[f"{name}_not_runnable"] = f"{type(error).__name__}: {error}"
            return
        try:
            difference = compare(run(self.masked, False), theirs)
        except Exception as error:
            self.result.fail(name, f"{type(error).__name__}: {error}")
            return
        _judge(name, difference, self.eager, self.result)


def peak_mib() -> float:
    """Largest resident memory of this process so far, in MiB."""
    import resource

    return math.ceil(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
