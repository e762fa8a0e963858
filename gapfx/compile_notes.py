"""What a compilation tells people beside the plan: what capture and passes gave up, and plans that look unwise."""

from __future__ import annotations

from gapfx.capture import Capture
from gapfx.compiler import Unit
from gapfx.layers import execution_order
from gapfx.pattern import parse_pattern
from gapfx.plan import Plan

LEAST_PER_OUTPUT = 2  # on the mean: with fewer, chance and ties leave some outputs without


def notes_of(unit: Unit, plan: Plan) -> tuple[str, ...]:
    """Notes of the capture, of a forward in eval that fails, of each refusal of a pass, and of a thin end."""
    refusals = (f"{fqn}: {reason}" for fqn, reason in unit.refusals)
    return (*unit.capture.notes, *_eval_notes(unit), *refusals, *_thin_end_notes(unit.capture, plan))


def _eval_notes(unit: Unit) -> tuple[str, ...]:
    failure = unit.in_eval.failure
    lost = "weights that other modules read in eval alone are not known"
    return (f"the model: its forward in eval fails ({failure}), so {lost}",) if failure else ()


def _thin_end_notes(capture: Capture, plan: Plan) -> tuple[str, ...]:
    """Where the last product of a forward is planned to keep fewer than two weights an output.

    An output without any is a constant, and no later layer makes up for it.
    """
    products = [fqn for fqn in execution_order(capture) if capture.parameters[fqn].role == "gemm"]
    last = next((weight for weight in plan.weights() if products and weight.fqn == products[-1]), None)
    if last is None:
        return ()
    outputs, kept = last.shape[0], parse_pattern(last.pattern).num_kept(last.shape, last.sparsity)
    if kept >= LEAST_PER_OUTPUT * outputs:
        return ()
    return (
        f"{last.fqn}: {kept:,} live weights for {outputs:,} outputs, of which some may get none and stay constant; "
        "keep it dense (--dense last) or take --allocation erk",
    )
