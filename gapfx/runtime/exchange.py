"""Moves a state into an engine and back, one parameter at a time, so that no rank holds more than one of them whole."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from gapfx.errors import AuditError
from gapfx.masks import unpack
from gapfx.plan import Plan
from gapfx.runtime.engine import (
    Engine,
    EngineOptions,
    buffers_of,
    compute_dtype,
    for_evaluation,
    local_device,
    place,
)
from gapfx.runtime.module_masks import put_bits, whole_bits_of
from gapfx.runtime.ranks import Peers
from gapfx.runtime.shards import make_state, moment_names, numel_of, read_part, write_part
from gapfx.runtime.skeleton import module_from
from gapfx.runtime.state import OptimizerState, TrainState, column, live_slice, own_part, whole, whole_bits
from gapfx.runtime.teams import Team, all_in_one_team

# Optimizer state that begins at 0 and has a reason to change only where a gradient comes: 0 for ever where none does.
ZERO_WITHOUT_GRADIENT = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg")


def build_module(
    plan: Plan,
    skeleton: nn.Module,
    state: TrainState,
    live: frozenset[str],
    options: EngineOptions | None = None,
    team: Team | None = None,
) -> nn.Module:
    """A fresh masked module that holds the state, on this rank's device (collective).

    `live` weights are columns of live values, others have their dense shape. With the options of an engine it is made
    for that: in the engine's dtype, and at stage 3 no rank keeps more than its part of a parameter.
    """

    def value(fqn: str, parameter: Tensor) -> Tensor:
        found = column(state, state.weights, fqn).view(-1, 1) if fqn in live else whole(state, state.weights, fqn)
        return found.to(_dtype(parameter, options), copy=True)

    placed = place(options, team or all_in_one_team()) if options else None
    module = module_from(skeleton, value, local_device(), placed)
    with torch.no_grad():
        for fqn, buffer in buffers_of(module):
            buffer.copy_(state.buffers[fqn])
    for weight in plan.weights():
        bits = whole_bits(state, weight.fqn).to(local_device())
        # Kernels that skip zeros keep an index of the whole mask, which they would make anew in every step.
        put_bits(module, weight, bits, None if weight.kernel == "sparse" else placed)
    return module


@contextmanager
def evaluation_module(
    plan: Plan, skeleton: nn.Module, state: TrainState, live: frozenset[str], options: EngineOptions
) -> Generator[nn.Module]:
    """A fresh masked module in fp32 for forwards alone, which at stage 3 no rank holds whole (collective)."""
    in_fp32 = replace(options.beside_flags(), dtype="fp32")
    module = build_module(plan, skeleton, state, live, in_fp32)
    with for_evaluation(module.eval(), in_fp32) as ready:
        yield ready


def _dtype(parameter: Tensor, options: EngineOptions | None) -> torch.dtype:
    is_lower = options is not None and options.dtype != "fp32" and parameter.is_floating_point()
    return compute_dtype(options) if is_lower and options else parameter.dtype


def fill_engine(engine: Engine, state: TrainState) -> None:
    """Give the engine the fp32 weights and the optimizer state, which it holds from now on (collective)."""
    if state.optimizer.moments or any(state.optimizer.scalars):
        make_state(engine.shards, engine.optimizer, state.optimizer)
    tables: list[tuple[str | None, dict[str, Tensor]]] = list(state.optimizer.moments.items())
    if engine.options.dtype != "fp32":
        tables.append((None, state.weights))  # the engine made its fp32 weights from rounded ones
    for key, table in tables:
        for fqn, parameter in engine.trained.items():
            write_part(engine.shards, parameter, key, _as_stored(state, table, fqn, parameter))
            del table[fqn]
    give_back(engine, state)


def give_back(engine: Engine, state: TrainState) -> None:
    """Free what the engine holds too: from here on it has them, until `take_state` brings them back."""
    state.optimizer = OptimizerState()
    state.weights = {fqn: value for fqn, value in state.weights.items() if fqn not in engine.trained}


def _as_stored(state: TrainState, table: Mapping[str, Tensor], fqn: str, parameter: Tensor) -> Tensor:
    is_dense = numel_of(parameter) == state.layout[fqn].numel
    return whole(state, table, fqn) if is_dense else column(state, table, fqn)


def take_state(engine: Engine, state: TrainState, *, is_last: bool, with_optimizer: bool = True) -> None:
    """The engine's weights, buffers and optimizer state (collective).

    `is_last`: the engine trains no more, and gives its memory up as it goes. Raises AuditError on every rank where
    masks were changed or weights that they drop are not 0.
    """
    peers, problems = state.peers, list(_changed_masks(engine.module, state))
    for _, buffer in buffers_of(engine.module):
        _average(buffer, peers)
    state.buffers = {fqn: buffer.detach().cpu().clone() for fqn, buffer in buffers_of(engine.module)}
    names = moment_names(engine.shards, engine.optimizer) if with_optimizer else []
    state.optimizer = OptimizerState({}, engine.scalars() if with_optimizer else [])
    if is_last:
        engine.drop_gradients()
    for key in (*names, None):
        table = state.weights if key is None else state.optimizer.moments.setdefault(key, {})
        for fqn, parameter in engine.trained.items():
            part = read_part(engine.shards, parameter, key)
            values = part if engine.shards.is_whole else peers.joined(part)
            problems += _take(state, table, fqn, values, key)
        if is_last and key is not None:
            engine.drop_moment(key)
    _raise(problems, state)


def _take(state: TrainState, table: dict[str, Tensor], fqn: str, values: Tensor, key: str | None) -> list[str]:
    """Put this rank's slice of a parameter's values into the table; what is wrong with it."""
    spread = state.layout[fqn]
    if fqn not in state.bits or values.numel() != spread.numel:
        table[fqn] = own_part(state, fqn, values)
        return []
    start, stop = state.bounds(fqn)
    own, bits = values.flatten()[start:stop], state.bits[fqn]
    table[fqn] = live_slice(own, bits)
    alive = int(own[~unpack(bits, own.shape)].count_nonzero())
    if not alive or (key is not None and key not in ZERO_WITHOUT_GRADIENT):
        return []
    what = "pruned weights" if key is None else f"values of {key} of pruned weights"
    return [f"{alive} {what} of {fqn} are not zero"]


def _changed_masks(module: nn.Module, state: TrainState) -> Iterator[str]:
    for fqn in state.bits:
        bits = whole_bits(state, fqn)
        with whole_bits_of(module, fqn) as held:
            if not torch.equal(held.cpu(), bits):
                yield f"the mask of {fqn} was changed in the model"


def _raise(problems: list[str], state: TrainState) -> None:
    every = state.peers.tell(problems)
    found = [f"{problem} on rank {rank}" for rank, told in enumerate(every) for problem in told]
    if found:
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        raise AuditError(f"{found[0]} at step {state.step}{more}")


def _average(buffer: Tensor, peers: Peers) -> None:
    """Running statistics differ between ranks that saw different samples: their mean is the model's.

    In place, so that a run goes on from exactly what its checkpoint holds.
    """
    if peers.size > 1 and buffer.is_floating_point() and buffer.numel():
        buffer.copy_(peers.total(buffer.clone()) / peers.size)
