"""Writes the trained model as dense weights with zeros in place, one tensor at a time.

Ranks hold a model in slices, and none of them needs to hold more than one weight of it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor, nn

from gapfx.errors import UserError
from gapfx.io.container import Entry, header, in_order, raw
from gapfx.masks import num_bytes
from gapfx.runtime.engine import buffers_of
from gapfx.runtime.exchange import build_module
from gapfx.runtime.ranks import raise_together
from gapfx.runtime.state import TrainState, whole, whole_bits
from gapfx.runtime.steps import Job

Maker = Callable[[], Tensor]


def write_model(path: Path, job: Job, state: TrainState) -> None:
    """Write the state under the model's own keys and dtypes, on rank 0 (collective).

    Extra state that is no tensor has no place in the file. Raises UserError on every rank when the disk refuses.
    """
    _write_together(path, in_order(_entries(job, state)), state)


@contextmanager
def masks_in_file(path: Path, state: TrainState) -> Generator[Mapping[str, Tensor]]:
    """FQN -> packed mask, whole, on rank 0, from a file there that is gone afterwards (collective).

    Raises UserError on every rank when the disk refuses.
    """
    numels = {fqn: state.layout[fqn].numel for fqn in state.bits}
    entries = [
        Entry(fqn, torch.uint8, (num_bytes(numel),), partial(whole_bits, state, fqn)) for fqn, numel in numels.items()
    ]
    try:
        _write_together(path, entries, state)
        yield TensorFile(path)
    finally:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class TensorFile(Mapping[str, Tensor]):
    """Key -> tensor of a safetensors file, read anew each time: what is read of an open file counts as our memory."""

    path: Path

    def __getitem__(self, key: str) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            if key not in file.keys():  # noqa: SIM118
                raise KeyError(key)
            return file.get_tensor(key).clone()

    def __iter__(self) -> Iterator[str]:
        with safe_open(self.path, framework="pt") as file:
            return iter(list(file.keys()))

    def __len__(self) -> int:
        return len(list(iter(self)))


def _write_together(path: Path, entries: Sequence[Entry], state: TrainState) -> None:
    temporary, failure = path.with_name(f".{path.name}.writing"), None
    file: BinaryIO | None = None
    try:
        if state.peers.rank == 0:
            file = temporary.open("wb")
            file.write(header(entries))
    except OSError as error:
        failure = error
    for entry in entries:
        tensor = entry.make()
        try:
            if file is not None and failure is None:
                file.write(raw(tensor))
        except OSError as error:  # the others still wait for this rank's slices
            failure = error
    failure = _close(file, temporary, path, failure)
    raise_together(state.peers, failure)


def _close(file: BinaryIO | None, temporary: Path, path: Path, failure: OSError | None) -> UserError | None:
    try:
        if file is not None:
            file.close()
            if failure is None:
                temporary.replace(path)
    except OSError as error:
        failure = failure or error
    if failure is None:
        return None
    temporary.unlink(missing_ok=True)
    return UserError(
        f"the model could not be written: {failure}",
        where=str(path),
        fix="free disk space and continue with --resume; the last checkpoint holds the trained weights",
    )


def _entries(job: Job, state: TrainState) -> Iterator[Entry]:
    """The state that a new model of the task has."""
    skeleton = job.module
    parameters = {id(parameter): fqn for fqn, parameter in skeleton.named_parameters()}
    buffers = {id(buffer): fqn for fqn, buffer in buffers_of(skeleton)}
    changed: dict[str, Tensor] = {}
    for key, value in skeleton.state_dict(keep_vars=True).items():
        if id(value) in parameters:
            yield _entry(key, value, _parameter(state, parameters[id(value)], value.dtype))
        elif id(value) in buffers:
            held = state.buffers[buffers[id(value)]]
            yield _entry(key, held, lambda held=held: held.cpu())
        elif isinstance(value, Tensor):
            # What a hook of the model makes of its weights, only the whole model can tell.
            changed = changed or _changed(job, skeleton, state)
            made = changed[key]
            yield _entry(key, made, lambda made=made: made)


def _entry(key: str, like: Tensor, make: Maker) -> Entry:
    return Entry(key, like.dtype, tuple(like.shape), make)


def _parameter(state: TrainState, fqn: str, dtype: torch.dtype) -> Maker:
    return lambda: whole(state, state.weights, fqn).to(dtype)


def _changed(job: Job, skeleton: nn.Module, state: TrainState) -> dict[str, Tensor]:
    module = build_module(job.plan, skeleton, state, frozenset()).cpu()
    return {key: value.detach() for key, value in module.state_dict().items() if isinstance(value, Tensor)}
