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
from gapfx.masks import stored_parameter
from gapfx.plan import Plan
from tools.zoo_cases.cases import Case, Inputs, kind_of
from tools.zoo_cases.masked import BlockWatch, Pair, by_hand, compiled, put_on, random_masks
from tools.zoo_cases.partitions import faults_of, pieces_of
from tools.zoo_cases.running import (
    Difference,
    NotRunnable,
    Outcome,
    compare,
    eval_call,
    seed_all,
    train_call,
)

# Capture and plan may take this many forwards and seconds.
FORWARDS, SECONDS = 3, 2.0
ZEROS_BECOME = 0.02
DEMOTED = "masked in form"


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

    def stop(self, cause: object) -> Result:
        """This result as that of a model that cannot run without gapfx."""
        self.status, self.failures = "not runnable", {"eager": str(cause)}
        return self


def check(case: Case) -> Result:
    """Run every check of a case; an error of gapfx is a failure, an error of the plain model is `not runnable`."""
    result = Result(case.key, case.family)
    try:
        plain, inputs = built(case)
        result.facts["kind"] = kind_of(case, inputs)
        eager = _eager(plain, inputs, result)
    except NotRunnable as error:
        return result.stop(error)
    _attempt("outline", result, lambda: _check_outline(plain, inputs, eager, result))
    if all(parameter.ndim < 2 for parameter in plain.parameters()):
        # gapfx says so in an error: there is nothing to mask.
        result.facts["weights"] = 0
        return result
    keys, names = list(plain.state_dict()), [fqn for fqn, _ in plain.named_parameters()]
    plan = _attempt("capture", result, lambda: _planned(case, plain, inputs, result))
    if plan is None:
        return result
    if list(plain.state_dict()) != keys or [fqn for fqn, _ in plain.named_parameters()] != names:
        result.fail("keys", "the keys of state_dict or the names of parameters changed")
    if result.facts["weights"]:
        _attempt("train", result, lambda: _check_masked(case, plain, plan, inputs, eager, result))
    return result


def _attempt(check: str, result: Result, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except Exception as error:
        result.fail(check, f"{type(error).__name__}: {error}")
        return None


def built(case: Case) -> tuple[nn.Module, Inputs]:
    """The model in train mode and its first batch. Raises NotRunnable.

    Parameters that start as zeros are small random numbers, or no gradient would get past a head or a branch of zeros.
    """
    seed_all(0)
    try:
        model, inputs = case.build().train(), case.batch(case.batch_sizes[0])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point() and not bool(parameter.any()):
                    parameter.normal_(0, ZEROS_BECOME)
        buffers = {fqn: buffer.clone() for fqn, buffer in model.named_buffers()}
        # Some models choose their kind of attention at their first call, and draw differently from then on.
        _forward_seconds(model, inputs)
        put_back(model, buffers)
    except Exception as error:
        raise NotRunnable(f"{type(error).__name__}: {error}") from error
    return model, inputs


def _eager(model: nn.Module, inputs: Inputs, result: Result) -> Difference:
    """By how much two runs of the plain model under one seed differ; buffers are put back after each."""
    parameters = dict(model.named_parameters())
    buffers = {fqn: buffer.clone() for fqn, buffer in model.named_buffers()}
    runs: list[Outcome] = []
    try:
        for _ in range(2):
            runs.append(train_call(model, parameters, inputs, {}))
            put_back(model, buffers)
        result.facts["forward_seconds"] = _forward_seconds(model, inputs)
        put_back(model, buffers)
    except Exception as error:
        raise NotRunnable(f"{type(error).__name__}: {error}") from error
    difference = compare(*runs)
    if difference.worst:
        result.facts["varies"] = f"{difference.worst:.1e} at {difference.where}"
    return difference


def _forward_seconds(model: nn.Module, inputs: Inputs) -> float:
    seed_all(1)
    began = time.perf_counter()
    model(*inputs.args, **inputs.kwargs)
    return time.perf_counter() - began


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
    if not difference.is_equal(eager.worst):
        itself = f"; the plain model differs from itself by {eager.worst:.1e}" if eager.worst else ""
        result.fail(check, f"differs by {difference.worst:.1e} at {difference.where}{itself}")


def put_back(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Give the buffers their values again."""
    with torch.no_grad():
        for fqn, buffer in model.named_buffers():
            if fqn in buffers and buffer.shape == buffers[fqn].shape:
                buffer.copy_(buffers[fqn])


def _planned(case: Case, model: nn.Module, inputs: Inputs, result: Result) -> Plan:
    """The plan of the model, which is masked in place; what is wrong with the plan is a failure."""
    matrices = {fqn for fqn, parameter in model.named_parameters(remove_duplicate=False) if parameter.ndim >= 2}
    watch, clock = BlockWatch(), list[float]()
    second = _second_batch(case, model, inputs)

    def verified(module: nn.Module) -> Any:
        clock.append(time.perf_counter())
        return module(*second.args, **second.kwargs)

    began = time.perf_counter()
    made = compiled(model, inputs, watch, check=verified)
    ended = time.perf_counter()
    result.facts["compile_seconds"] = (clock[0] if clock else ended) - began
    result.facts["verify_seconds"] = ended - clock[0] if clock else 0.0
    demoted = [note for note in made.notes if DEMOTED in note]
    if demoted:
        result.facts["demoted"] = [note[:200] for note in demoted[:3]]
    if is_slow(result.facts):
        _measure_again(case, result)
    plan = made.plan
    result.facts |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights": sum(1 for _ in plan.weights()),
        "groups": len(plan.groups),
        "dense": len(plan.dense),
        "notes": len(made.notes),
    }
    if made.notes:
        result.facts["refusals"] = [note[:200] for note in made.notes[:3]]
    pieces, cuts = pieces_of(plan, watch.blocks)
    result.facts |= {"blocks": len(watch.blocks)} | ({"pieces": pieces} if pieces else {})
    for fault in (*faults_of(model, plan, matrices), *cuts):
        result.fail("partition", fault)
    return plan


def _second_batch(case: Case, model: nn.Module, inputs: Inputs) -> Inputs:
    """A batch of another size; the first one again where the plain model runs no other."""
    seed_all(2)
    other = case.batch(case.batch_sizes[1])
    buffers = {fqn: buffer.clone() for fqn, buffer in model.named_buffers()}
    try:
        model(*other.args, **other.kwargs)
    except Exception:
        return inputs
    finally:
        put_back(model, buffers)
    return other


def is_slow(facts: Mapping[str, Any]) -> bool:
    """Whether capture and plan, which run a forward in training and one in eval, took longer than the limit."""
    forward = max(facts.get("forward_seconds", 0), facts.get("eval_forward_seconds", 0))
    return facts.get("compile_seconds", 0) > FORWARDS * forward + SECONDS


def _measure_again(case: Case, result: Result) -> None:
    """Another machine load may have hidden the truth: forwards and plan of a second build, the one in eval too."""
    again, inputs = built(case)
    result.facts["compile_seconds_first"] = result.facts["compile_seconds"]
    result.facts["forward_seconds"] = _forward_seconds(again, inputs)
    result.facts["eval_forward_seconds"] = _forward_seconds(again.eval(), inputs)
    again.train()
    began = time.perf_counter()
    compiled(again, inputs)
    result.facts["compile_seconds"] = time.perf_counter() - began


def _check_masked(case: Case, masked: nn.Module, plan: Plan, inputs: Inputs, eager: Difference, result: Result) -> None:
    """Training, evaluation and another batch size against a second build with masks multiplied in by hand."""
    masks = random_masks(plan)
    reference, _ = built(case)
    _check_same_build(reference, masked)
    by_hand(reference, masks)
    put_on(masked, plan, masks)
    pair = Pair(masked, reference, masks)
    seed_all(2)
    other = case.batch(case.batch_sizes[1])
    for name, run in (
        ("train", lambda model: pair.train(model, inputs)),
        ("eval", lambda model: eval_call(model, inputs)),
        ("batch", lambda model: pair.train(model, other)),
    ):
        _compare(name, pair, run, eager, result)


def _compare(name: str, pair: Pair, run: Callable[[nn.Module], Outcome], eager: Difference, result: Result) -> None:
    try:
        ours, theirs = pair.both(run)
    except NotRunnable as error:
        # The plain model trains, or this case would not be here.
        if name == "train":
            result.fail(name, f"the reference: {error}")
        result.facts[f"{name}_not_runnable"] = str(error)[:300]
        return
    except Exception as error:
        result.fail(name, f"{type(error).__name__}: {error}")
        return
    if name == "train":
        result.facts["live"] = sum(bool(theirs.values.get(f"grad.{fqn}", torch.zeros(1)).any()) for fqn in pair.masks)
    _judge(name, compare(ours, theirs), eager, result)


def _check_same_build(reference: nn.Module, masked: nn.Module) -> None:
    for fqn, parameter in reference.named_parameters():
        if not torch.equal(parameter, stored_parameter(masked, fqn)):
            raise NotRunnable(f"two builds under one seed differ in {fqn}")


def peak_mib() -> float:
    """Largest resident memory of this process so far, in MiB."""
    import resource

    return math.ceil(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
