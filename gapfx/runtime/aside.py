"""Weights kept aside for later phases: to go back to (rewinding), or for weights that grow again to start from."""

from __future__ import annotations

from collections.abc import Iterable

from gapfx.masks import unpack
from gapfx.runtime.state import TrainState, dense_slice, live_slice


def keep(state: TrainState, fqns: Iterable[str]) -> None:
    """Copy this rank's slices of the weights, with their zeros in place, to `state.aside`: four bytes a weight."""
    for fqn in fqns:
        state.aside[fqn] = dense_slice(state, state.weights, fqn).clone()


def keep_taken(state: TrainState, fqns: Iterable[str]) -> None:
    """Keep the weights as they are before a prune takes some of them; of those that are masked, what was kept of them.

    So what several prunes of one turn take, one after the other, is kept as each of them found it.
    """
    for fqn in fqns:
        own = dense_slice(state, state.weights, fqn)
        kept = state.aside.get(fqn, own)
        state.aside[fqn] = own.where(unpack(state.bits[fqn], own.shape), kept).clone()


def rewind(state: TrainState) -> None:
    """Give every weight the value that it had when it was kept, where its mask of now lets it live.

    Late rewinding (Frankle et al., ICML 2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis"); buffers,
    such as running means, stay as they are.
    """
    for fqn in state.weights:
        state.weights[fqn] = live_slice(state.aside[fqn], state.bits.get(fqn))


def regrow_saved(state: TrainState, fqns: Iterable[str]) -> None:
    """Give weights that have just grown the values that were kept of them, where they had been masked.

    Those that nothing was kept of stay at 0. What was kept of them is forgotten.
    """
    for fqn in fqns:
        saved = state.aside.pop(fqn, None)
        if saved is not None:
            was_live = unpack(state.sparse_bits[fqn], saved.shape)
            state.weights[fqn] = saved.where(~was_live, state.weights[fqn])
