"""Checkpoints that are whole or absent.

A checkpoint is a directory `step-00000120` with `state.safetensors` (weights, buffers, packed masks, moments),
`state.json` (step and numbers of the optimizer) and `manifest.json` (size and SHA-256 of each file). It is written
beside its place, synced to disk and renamed, so that a process that dies at any moment leaves the older ones intact.
Reading verifies the manifest and falls back to the newest good one; nothing in it is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from gapfx.errors import CheckpointError
from gapfx.runtime.grow_prune import TrainState
from gapfx.runtime.shards import OptimizerState

FORMAT_VERSION = 1
_TABLES = ("weights", "buffers", "bits", "sparse_bits", "explored")


def checkpoint_name(step: int) -> str:
    """Name of the directory of the checkpoint of `step`."""
    return f"step-{step:08d}"


def save_checkpoint(directory: Path, state: TrainState, keep: int) -> Path:
    """Write the state as the newest checkpoint in `directory` and delete all but the newest `keep`.

    Checkpoints of later steps go too: the run was continued from before them, because they were damaged.

    Raises CheckpointError when the disk refuses, with the older checkpoints untouched.
    """
    final, temporary = directory / checkpoint_name(state.step), directory / f".writing-{state.step:08d}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for left_over in directory.glob(".writing-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        temporary.mkdir()
        _write_state(temporary, state)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _sync(directory)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of step {state.step} could not be written: {error}",
            where=str(directory),
            fix="free disk space and continue with --resume; older checkpoints are untouched",
        ) from error
    steps = _step_directories(directory)
    kept = [step for step in steps if step <= state.step][-keep:]
    for step in steps.keys() - set(kept):
        shutil.rmtree(steps[step], ignore_errors=True)
    return final


def load_checkpoint(directory: Path) -> tuple[TrainState, list[str]] | None:
    """The newest good checkpoint and why newer ones were passed over; None when there is none at all.

    Raises CheckpointError when there are checkpoints but none of them is whole.
    """
    problems: list[str] = []
    for path in reversed(_step_directories(directory).values()):
        try:
            _verify(path)
            return _read_state(path), problems
        except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
            problems.append(f"{path.name} is damaged: {error}")
    if problems:
        raise CheckpointError(
            f"no checkpoint is whole: {'; '.join(problems)}",
            where=str(directory),
            fix="restore a checkpoint from a backup, or start again with --force",
        )
    return None


def _step_directories(directory: Path) -> dict[int, Path]:
    """Step -> directory, oldest first."""
    paths = directory.iterdir() if directory.is_dir() else ()
    found = {int(path.name[5:]): path for path in paths if re.fullmatch(r"step-[0-9]{8,}", path.name)}
    return dict(sorted(found.items()))


def _write_state(directory: Path, state: TrainState) -> None:
    # safetensors refuses tensors that share memory (a mask that is also the last sparse mask), hence the clones.
    tensors = {f"{table}/{fqn}": tensor.contiguous().clone() for table, fqn, tensor in _entries(state)}
    save_file(tensors, directory / "state.safetensors")
    facts = {"format": FORMAT_VERSION, "step": state.step, "scalars": state.optimizer.scalars}
    (directory / "state.json").write_text(json.dumps(facts))
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in directory.iterdir()}
    (directory / "manifest.json").write_text(json.dumps(files, indent=1))
    for path in directory.iterdir():
        _sync(path)
    _sync(directory)


def _entries(state: TrainState) -> Iterator[tuple[str, str, Tensor]]:
    for table in _TABLES:
        for fqn, tensor in getattr(state, table).items():
            yield table, fqn, tensor.cpu()
    for key, moments in state.optimizer.moments.items():
        for fqn, tensor in moments.items():
            yield f"moment:{key}", fqn, tensor


def _verify(directory: Path) -> None:
    files: dict[str, dict[str, Any]] = json.loads((directory / "manifest.json").read_text())
    if set(files) != {"state.safetensors", "state.json"}:
        raise ValueError(f"the manifest names {sorted(files)}")
    for name, facts in files.items():
        size = (directory / name).stat().st_size
        if size != facts["bytes"]:
            raise ValueError(f"{name} has {size} bytes, the manifest says {facts['bytes']}")
        if _sha256(directory / name) != facts["sha256"]:
            raise ValueError(f"{name} does not match its SHA-256")


def _read_state(directory: Path) -> TrainState:
    facts: dict[str, Any] = json.loads((directory / "state.json").read_text())
    if facts["format"] != FORMAT_VERSION:
        raise ValueError(f"it has format {facts['format']}, this gapfx reads {FORMAT_VERSION}")
    tables: dict[str, dict[str, Tensor]] = {table: {} for table in _TABLES}
    for key, tensor in load_file(directory / "state.safetensors").items():
        table, _, fqn = key.partition("/")
        tables.setdefault(table, {})[fqn] = tensor
    moments = {table.partition(":")[2]: values for table, values in tables.items() if table.startswith("moment:")}
    scalars = [{key: (value[0], value[1]) for key, value in group.items()} for group in facts["scalars"]]
    return TrainState(**{t: tables[t] for t in _TABLES}, optimizer=OptimizerState(moments, scalars), step=facts["step"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
