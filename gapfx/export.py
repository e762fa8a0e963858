"""`gapfx export`: a finished run, or a file of a model, in another form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gapfx.errors import UserError
from gapfx.io.dense_files import Source, write_dense
from gapfx.io.forms import TwoOfFour, csr_of
from gapfx.io.onnx_file import run_onnx, write_onnx
from gapfx.io.sparse_file import SparseFile, open_sparse
from gapfx.io.write_sparse import write_sparse
from gapfx.loading import load_dense
from gapfx.origin import Origin, is_sparse_file, opened
from gapfx.run_dir import RunDir

Form = Literal["gapfx", "safetensors", "csr", "2:4", "onnx", "program"]
SUFFIXES: Mapping[Form, str] = {
    **{"gapfx": ".gapfx", "safetensors": ".safetensors", "csr": ".csr.pt", "2:4": ".2of4.pt"},
    **{"onnx": ".onnx", "program": ".pt2"},
}
TOLERANCE = 1e-5  # of what a run computes in another form, relative to its largest output where that is above 1
MEBIBYTE = 2**20


@dataclass(frozen=True)
class ExportOptions:
    """Compressed values (gapfx), files of at most so many MiB (safetensors), sparse initialisers (onnx)."""

    is_compressed: bool = False
    shard_mib: int = 0
    is_sparse: bool = False


def export(source: Path, to: str, out: Path | None, options: ExportOptions, *, force: bool = False) -> str:
    """Write the model at `source` in the form `to`, and say what was written and how it was checked.

    Raises UserError for a source that is none, a form that it cannot have, and a file that is there already.
    """
    if to not in get_args(Form):
        raise UserError(f"there is no form {to!r}", fix=f"take one of {', '.join(get_args(Form))}")
    form = cast(Form, to)
    path = out or _default_out(source, form, options)
    if path.exists() and not force:
        raise UserError(f"{path} exists", fix="give another --out, or --force to replace it")
    if not path.parent.is_dir():
        raise UserError(f"the folder {path.parent} does not exist", fix="make it, or give another --out")
    try:
        words = _WRITERS[form](source, path, options)
    except OSError as error:
        raise UserError(
            f"{path} could not be written: {error}", fix="free disk space, or give another --out"
        ) from error
    return f"{path}: {words}"


def _default_out(source: Path, form: Form, options: ExportOptions) -> Path:
    if form == "safetensors" and options.shard_mib:
        return source / "sharded" if source.is_dir() else source.with_suffix("")
    return source / f"model{SUFFIXES[form]}" if source.is_dir() else source.with_suffix(SUFFIXES[form])


def _write_gapfx(source: Path, path: Path, options: ExportOptions) -> str:
    with opened(source) as (tensors, plan, masks):
        index = write_sparse(path, tensors, plan=plan, masks=masks, is_compressed=options.is_compressed)
        dense = _dense_bytes(tensors)
    size = path.stat().st_size
    return f"{size:,} bytes, {dense / size:.2f} times smaller than dense; {len(index.weights)} sparse weights"


def _dense_bytes(tensors: Source) -> int:
    likes = (tensors.like(key) for key in tensors.keys())  # noqa: SIM118
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in likes)


def _write_safetensors(source: Path, path: Path, options: ExportOptions) -> str:
    with opened(source) as (tensors, _, _):
        files = write_dense(path, tensors, most_bytes=options.shard_mib * MEBIBYTE)
    size = sum(file.stat().st_size for file in files)
    return f"{size:,} bytes in {len(files)} file{'s' * (len(files) > 1)}, zeros in place"


def _write_csr(source: Path, path: Path, options: ExportOptions) -> str:
    return _write_sparse_weights(source, path, csr_of, "as torch.sparse_csr")


def _write_two_of_four(source: Path, path: Path, options: ExportOptions) -> str:
    def packed(file: SparseFile, key: str) -> dict[str, Tensor]:
        try:
            found = TwoOfFour.of(file.tensor(key))
        except UserError as error:
            raise UserError(f"{key}: {error.what}", fix=error.fix) from error
        return {"values": found.values, "places": found.places}

    return _write_sparse_weights(source, path, packed, "as values and places of two bits (gapfx.io.forms.TwoOfFour)")


def _write_sparse_weights(source: Path, path: Path, make: Callable[[SparseFile, str], object], words: str) -> str:
    """A state_dict by torch.save, its sparse weights in another form; torch.load(weights_only=True) reads it."""
    sparse = source if is_sparse_file(source) else RunDir(source).sparse
    if not sparse.is_file():
        raise UserError(f"{source} has no sparse weights", fix="export it --to gapfx first, and take that file")
    with open_sparse(sparse) as file:
        made = {key: make(file, key) if file.weight(key) else file.tensor(key) for key in file.keys()}  # noqa: SIM118
        count = sum(file.weight(key) is not None for key in made)
    torch.save(made, path)
    return f"{path.stat().st_size:,} bytes, {count} weights {words}"


def _write_onnx(source: Path, path: Path, options: ExportOptions) -> str:
    module, args, kwargs = _traced(source)
    write_onnx(path, module, args, kwargs, is_sparse=options.is_sparse)
    try:
        found = run_onnx(path, args, kwargs)
    except UserError as error:
        return f"{path.stat().st_size:,} bytes, not checked: {error.what}"
    return f"{path.stat().st_size:,} bytes; in ONNX Runtime {_compared(found, module, args, kwargs)}"


def _write_program(source: Path, path: Path, options: ExportOptions) -> str:
    module, args, kwargs = _traced(source)
    torch.export.save(torch.export.export(module, tuple(args), dict(kwargs)), path)
    loaded = torch.export.load(path).module()
    with torch.no_grad():
        found = tree_leaves(loaded(*args, **kwargs))
    return f"{path.stat().st_size:,} bytes; read back {_compared(found, module, args, kwargs)}"


def _compared(found: list[Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """How far the outputs are from those of torch. Raises UserError for more than rounding."""
    with torch.no_grad():
        wanted = [leaf for leaf in tree_leaves(module(*args, **kwargs)) if isinstance(leaf, Tensor)]
    pairs = list(zip((leaf for leaf in found if isinstance(leaf, Tensor)), wanted, strict=True))
    differences = [float((a.double() - b.double()).abs().max()) if b.numel() else 0.0 for a, b in pairs]
    largest = max([1.0, *(float(b.double().abs().max()) for b in wanted if b.numel())])
    worst = max(differences, default=0.0)
    if not worst <= TOLERANCE * largest:
        raise UserError(
            f"its outputs differ by {worst:.2g} from those of torch", fix="report the model: the file is wrong"
        )
    return f"its outputs differ by at most {worst:.2g}, which is {worst / largest:.2g} of the largest"


def _traced(source: Path) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The dense model of a run, and the inputs that a batch of its task has for it."""
    Origin(source).run()
    module, run = load_dense(source)
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            run(module)
    finally:
        handle.remove()
    if not seen:
        raise UserError("the loss of the task never calls the model", fix="call model(...) in loss()")
    return module, *seen[0]


_WRITERS: Mapping[Form, Callable[[Path, Path, ExportOptions], str]] = {
    "gapfx": _write_gapfx,
    "safetensors": _write_safetensors,
    "csr": _write_csr,
    "2:4": _write_two_of_four,
    "onnx": _write_onnx,
    "program": _write_program,
}
