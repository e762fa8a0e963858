"""A last layer with too few live weights: an output without any is a constant, and no later layer makes up for it."""

from __future__ import annotations

from gapfx.capture import Capture
from gapfx.layers import execution_order
from gapfx.pattern import parse_pattern
from gapfx.plan import Plan

LEAST_PER_OUTPUT = 2  # on the mean: with fewer, chance and ties leave some outputs without


def thin_end_notes(capture: Capture, plan: Plan) -> tuple[str, ...]:
    """A note where the last product of a forward is planned to keep fewer than two weights an output."""
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
