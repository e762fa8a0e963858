"""Where a trained model comes from: the directory of a finished run, or a sparse file."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gapfx.errors import FileError, UserError
from gapfx.io.dense_files import DenseFiles, Source
from gapfx.io.sparse_file import ENTRY, SparseFile, open_sparse
from gapfx.plan import Plan
from gapfx.run_dir import RunDir

SUFFIX = ".gapfx"


@dataclass(frozen=True)
class Origin:
    """The path of either."""

    path: Path

    def run(self) -> RunDir:
        """The run. Raises UserError for a sparse file, which holds no task."""
        if self.path.is_file():
            raise UserError(
                "a sparse file does not say how its model is built",
                where=str(self.path),
                fix="give model= and args= of its forward, or load the directory of the run",
            )
        return RunDir(self.path)

    def plan(self) -> Plan:
        """The plan that the model was trained by. Raises UserError for what is not there, or not finished."""
        if self.path.is_file():
            with open_sparse(self.path) as file:
                found = file.plan
            if found is None:
                raise UserError("the file has no plan", where=str(self.path), fix="read it with gapfx.load_sparse")
            return found
        folder = RunDir(self.path)
        plan = folder.saved_plan() if folder.config.is_file() else None
        if plan is None:
            raise UserError(
                f"{folder.path} holds no run",
                fix="give the directory that `gapfx sparsify --out` wrote, or model.gapfx",
            )
        if not (folder.summary.is_file() and folder.model.is_file()):
            raise UserError(
                f"the run in {folder.path} is not finished", fix="finish it with `gapfx sparsify ... --resume`"
            )
        return plan

    def fill(self, module: nn.Module) -> None:
        """Copy the trained tensors into the module, one by one. Raises UserError for those of another model."""
        if self.path.is_file():
            with open_sparse(self.path) as file:
                copy_into(module, file, self.path)
            return
        path = RunDir(self.path).model
        try:
            with DenseFiles(path) as file:
                copy_into(module, file, path)
        except FileError as error:
            raise UserError(
                f"the model of the run cannot be read: {error.what}",
                where=str(path),
                fix="restore the file, or delete it and run `gapfx sparsify ... --resume`, which writes it again",
            ) from error


@contextmanager
def opened(source: Path) -> Generator[tuple[Source, Plan | None, Mapping[str, Tensor] | None]]:
    """The tensors of a run, a sparse file, or dense safetensors; their plan and packed masks, if known."""
    if is_sparse_file(source):
        with open_sparse(source) as file:
            yield file, file.plan, _bits(file)
    elif source.is_dir() and (source / "config.json").is_file() and (source / "plan.json").is_file():
        plan = Origin(source).plan()
        if not RunDir(source).sparse.is_file():
            with DenseFiles(RunDir(source).model) as dense:
                yield dense, plan, None
            return
        with open_sparse(RunDir(source).sparse) as file:
            yield file, plan, _bits(file)
    elif source.exists():
        with DenseFiles(source) as dense:
            yield dense, None, None
    else:
        raise UserError(f"{source} does not exist", fix="give a run directory, a .gapfx or a .safetensors file")


def _bits(file: SparseFile) -> dict[str, Tensor]:
    return {weight.key: file.bits(weight.key) for weight in file.index.weights}


def is_sparse_file(path: Path) -> bool:
    """Whether a file is a sparse one, or is called so."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return ENTRY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return path.suffix == SUFFIX  # whoever opens it says what is wrong


def fill_from(module: nn.Module, path: Path) -> None:
    """Give a module the weights of a run, a sparse file or dense safetensors. Raises UserError for another model's."""
    with opened(path) as (tensors, _, _):
        copy_into(module, tensors, path)


def copy_into(module: nn.Module, source: Source, where: Path) -> None:
    """Copy all tensors of a source into the module. Raises UserError unless keys and shapes are those of its state.

    A file may hold buffers beside them that the module makes by itself, such as position numbers, if they are equal.
    """
    own = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    keys = set(source.keys())
    lacking, spare = sorted(own.keys() - keys), sorted(keys - own.keys() - _equal_buffers(module, source))
    if lacking or spare:
        raise _another_model(where, f"it has no {lacking[0]!r}" if lacking else f"the model has no {spare[0]!r}")
    for key, value in own.items():
        _, shape = source.like(key)
        if shape != tuple(value.shape):
            raise _another_model(where, f"{key} is {list(value.shape)} in the model, {list(shape)} in it")
        module.load_state_dict({key: source.tensor(key)}, strict=False)


def _equal_buffers(module: nn.Module, source: Source) -> set[str]:
    buffers, keys = dict(module.named_buffers()), set(source.keys())
    return {name for name in buffers.keys() & keys if torch.equal(buffers[name].cpu(), source.tensor(name).cpu())}


def _another_model(where: Path, what: str) -> UserError:
    return UserError(
        f"these are weights of another model: {what}",
        where=str(where),
        fix="give the model, or the task file, that the run was started with",
    )
