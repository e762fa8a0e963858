"""Checkpoints that are whole or absent, written and read by all ranks, each its own slices.

A checkpoint is a directory `step-00000120` with a file `rank-00000.safetensors` a rank (its slices of weights, packed
masks and moments; buffers in the first), `state.json` (step, how parameters are cut, numbers of the optimizer) and
`manifest.json` (size and SHA-256 of each file). It is written beside its place, synced to disk and renamed, so that a
process that dies at any moment leaves the older ones intact. Reading verifies the manifest and falls back to the newest
good one; nothing in it is ever executed. Any number of ranks, ZeRO stage and form reads what any other wrote.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor, nn

from gapfx.errors import CheckpointError
from gapfx.io.container import Entry, write_tensors
from gapfx.runtime.ranks import Peers, on_each, on_first
from gapfx.runtime.slice_files import TABLES, read_slices, slice_file
from gapfx.runtime.state import OptimizerState, Spread, TrainState

FORMAT_VERSION = 3
_REPLACED = ".replaced-"
READ_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, safetensors.SafetensorError)


def checkpoint_name(step: int) -> str:
    """Name of the directory of the checkpoint of `step`."""
    return f"step-{step:08d}"


def save_checkpoint(directory: Path, state: TrainState, keep: int) -> Path:
    """Write the state as the newest checkpoint in `directory` and delete all but the newest `keep` (collective).

    Checkpoints of later steps go too: the run was continued from before them, because they were damaged.

    Raises CheckpointError on every rank when the disk refuses one, with the older checkpoints untouched.
    """
    peers, final = state.peers, directory / checkpoint_name(state.step)
    temporary = directory / f".writing-{state.step:08d}"
    try:
        on_first(peers, lambda: _begin(directory, temporary))
        on_each(peers, lambda: _write_slices(temporary, state))
        on_first(peers, lambda: _finish(temporary, final, state))
    except (OSError, safetensors.SafetensorError) as error:
        if peers.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of step {state.step} could not be written: {error}",
            where=str(directory),
            fix="free disk space and continue with --resume; older checkpoints are untouched. "
            "Ranks on several machines need a directory that all of them share",
        ) from error
    if peers.rank == 0:
        steps = _step_directories(directory)
        kept = [step for step in steps if step <= state.step][-keep:]
        for step in steps.keys() - set(kept):
            shutil.rmtree(steps[step], ignore_errors=True)
    return final


def load_checkpoint(directory: Path, peers: Peers | None = None) -> tuple[TrainState, list[str]] | None:
    """The newest good checkpoint and why newer ones were passed over; None when there is none at all (collective).

    Raises CheckpointError when there are checkpoints but none of them is whole.
    """
    peers = peers or Peers()
    on_first(peers, lambda: _put_back(directory))
    [names, *_] = peers.tell([path.name for path in _step_directories(directory).values()])
    problems: list[str] = []
    for name in reversed(names):
        reader = _Reader(directory / name, peers)
        # All files are known to be good before any tensor is read.
        found = reader.problem_of(reader.verify) or reader.problem_of(reader.read)
        if reader.state is not None and not found:
            return reader.state, problems
        problems.append(f"{name} is damaged: {found}")
    if problems:
        raise CheckpointError(
            f"no checkpoint is whole: {'; '.join(problems)}",
            where=str(directory),
            fix="restore a checkpoint from a backup, or start again with --force",
        )
    return None


def check_model(module: nn.Module, state: TrainState, where: Path) -> None:
    """Raise CheckpointError when the model has other parameters than the checkpoint."""
    shapes = {fqn: tuple(parameter.shape) for fqn, parameter in module.named_parameters()}
    held = {fqn: tuple(spread.shape) for fqn, spread in state.layout.items()}
    differing = sorted(fqn for fqn in shapes.keys() | held.keys() if shapes.get(fqn) != held.get(fqn))
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"the checkpoint is of another model: {name} is {held.get(name, 'not there')} in it, "
            f"{shapes.get(name, 'not there')} in the model",
            where=str(where),
            fix="continue with the model that the run was started with, or start another run with another --out",
        )


def _step_directories(directory: Path) -> dict[int, Path]:
    """Step -> directory, oldest first."""
    paths = directory.iterdir() if directory.is_dir() else ()
    found = {int(path.name[5:]): path for path in paths if re.fullmatch(r"step-[0-9]{8,}", path.name)}
    return dict(sorted(found.items()))


def _begin(directory: Path, temporary: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    _put_back(directory)
    for left_over in directory.glob(".writing-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    temporary.mkdir()


def _put_back(directory: Path) -> None:
    """Undo the first half of a replacement that was killed before the second."""
    for aside in directory.glob(f"{_REPLACED}step-*"):
        final = directory / aside.name.removeprefix(_REPLACED)
        if final.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(final)


def _write_slices(directory: Path, state: TrainState) -> None:
    path = directory / slice_file(state.peers.rank)
    # One after another, from where they are: an engine may hold as much again meanwhile.
    write_tensors(path, _entries(state))
    facts = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    (directory / f"{path.name}.json").write_text(json.dumps(facts))


def _entries(state: TrainState) -> Iterator[Entry]:
    """What this rank writes: `table/FQN`."""
    held = dict(zip(TABLES, (state.weights, state.bits, state.sparse_bits, state.explored, state.aside), strict=True))
    held |= {f"moment:{key}": moments for key, moments in state.optimizer.moments.items()}
    held |= {"buffers": state.buffers} if state.peers.rank == 0 else {}
    for table, tensors in held.items():
        for fqn, tensor in tensors.items():
            yield Entry(f"{table}/{fqn}", tensor.dtype, tuple(tensor.shape), partial(Tensor.detach, tensor))


def _finish(temporary: Path, final: Path, state: TrainState) -> None:
    """Gather what ranks say of their files into the manifest, and put the directory in its place."""
    facts = {
        "format": FORMAT_VERSION,
        "step": state.step,
        "owed": state.owed,
        "scalars": state.optimizer.scalars,
        "num_slices": state.peers.size,
        "layout": {fqn: [spread.shape, spread.granule] for fqn, spread in state.layout.items()},
    }
    (temporary / "state.json").write_text(json.dumps(facts))
    manifest: dict[str, Any] = {}
    for rank in range(state.peers.size):
        told = temporary / f"{slice_file(rank)}.json"
        manifest[slice_file(rank)] = json.loads(told.read_text())
        told.unlink()
    path = temporary / "state.json"
    manifest[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for path in (temporary / "state.json", temporary / "manifest.json", temporary):
        _sync(path)
    replaced = final.with_name(f"{_REPLACED}{final.name}")
    if final.exists():  # deleting it takes a while, in which there would be neither
        final.rename(replaced)
    temporary.rename(final)
    _sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@dataclass
class _Reader:
    """Reads this rank's part of a checkpoint; ranks verify its files in turn."""

    path: Path
    peers: Peers
    state: TrainState | None = None

    def problem_of(self, action: Callable[[], None]) -> str:
        """What is wrong on the lowest rank where the action fails; "" where it does on none (collective)."""
        problem = ""
        try:
            action()
        except READ_ERRORS as error:
            problem = str(error) or type(error).__name__
        return next((told for told in self.peers.tell(problem) if told), "")

    def facts(self) -> dict[str, Any]:
        """What the state is like."""
        return json.loads((self.path / "state.json").read_text())

    def verify(self) -> None:
        """Raise unless the manifest names what must be there, and the files that fall to this rank are as it says."""
        manifest: dict[str, dict[str, Any]] = json.loads((self.path / "manifest.json").read_text())
        for index, name in enumerate(sorted(manifest)):
            size = (self.path / name).stat().st_size
            if size != manifest[name]["bytes"]:
                raise ValueError(f"{name} has {size} bytes, the manifest says {manifest[name]['bytes']}")
            if index % self.peers.size == self.peers.rank and _sha256(self.path / name) != manifest[name]["sha256"]:
                raise ValueError(f"{name} does not match its SHA-256")
        facts = self.facts()
        if facts["format"] != FORMAT_VERSION:
            raise ValueError(f"it has format {facts['format']}, this gapfx reads {FORMAT_VERSION}")
        if set(manifest) != {"state.json", *(slice_file(rank) for rank in range(facts["num_slices"]))}:
            raise ValueError(f"the manifest names {sorted(manifest)}")

    def read(self) -> None:
        """Set the state."""
        facts = self.facts()
        layout = {fqn: Spread(tuple(shape), granule) for fqn, (shape, granule) in facts["layout"].items()}
        tables, lives = read_slices(self.path, layout, facts["num_slices"], self.peers)
        moments = {table.partition(":")[2]: tables.pop(table) for table in list(tables) if table.startswith("moment:")}
        scalars = [{key: (value[0], value[1]) for key, value in group.items()} for group in facts["scalars"]]
        optimizer = OptimizerState(moments, scalars)
        step, owed = facts["step"], facts.get("owed", "")
        self.state = TrainState(
            layout, optimizer=optimizer, peers=self.peers, step=step, owed=owed, lives=lives, **tables
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
