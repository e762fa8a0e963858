"""Dense safetensors: one file, or a folder of several with the index of Hugging Face, read tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, Self, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gapfx.errors import FileError
from gapfx.io.container import DTYPES, Entry, write_tensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Source(Protocol):
    """Tensors by key, of which one at a time is read."""

    def keys(self) -> Iterable[str]:
        """Keys of all tensors."""
        ...

    def like(self, key: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of a tensor."""
        ...

    def tensor(self, key: str) -> Tensor:
        """The tensor."""
        ...


class DenseFiles:
    """The tensors of a file, or of a folder with `model.safetensors` or an index; use it in a `with`.

    Raises FileError for what cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._stack = path, ExitStack()
        self._home: dict[str, Any] = {}
        try:
            for name, keys in _parts(path).items():
                file: Any = self._stack.enter_context(safe_open(name, framework="pt"))
                held = set(file.keys())
                missing = sorted((keys or held) - held)
                if missing:
                    raise _broken(path, f"{name.name} has no {missing[0]}, which its index places there")
                self._home |= dict.fromkeys(keys or held, file)
        except (SafetensorError, OSError) as error:
            self._stack.close()
            raise _broken(path, f"it cannot be read: {error}") from error
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *failure: object) -> None:
        """Close the files."""
        self._stack.close()

    def keys(self) -> Iterator[str]:
        """Keys of all tensors."""
        return iter(self._home)

    def like(self, key: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of a tensor."""
        part = self._home[key].get_slice(key)
        if part.get_dtype() not in DTYPES:
            raise _broken(self.path, f"{key} has the type {part.get_dtype()}, which is not known here")
        return DTYPES[part.get_dtype()], tuple(part.get_shape())

    def tensor(self, key: str) -> Tensor:
        """The tensor."""
        try:
            return self._home[key].get_tensor(key)
        except SafetensorError as error:
            raise _broken(self.path, f"{key} cannot be read: {error}") from error


def _parts(path: Path) -> dict[Path, set[str]]:
    """File -> the keys that are taken of it; an empty set for all."""
    if path.is_file():
        return {path: set()}
    index = path / INDEX
    if not index.is_file():
        return {path / SINGLE: set()}
    try:
        places: object = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError, UnicodeDecodeError) as error:
        raise _broken(index, f"it is no index of safetensors files: {error}") from error
    found: dict[Path, set[str]] = {}
    for key, name in cast(dict[str, object], places).items() if isinstance(places, dict) else ():
        if not isinstance(name, str) or Path(name).name != name:
            raise _broken(index, f"it places {key} in {name!r}, which is no file beside it")
        found.setdefault(path / name, set()).add(key)
    if not found:
        raise _broken(index, "it places no tensors")
    return found


def write_dense(out: Path, source: Source, *, most_bytes: int = 0) -> list[Path]:
    """Write all tensors of a source; in files of at most `most_bytes` with an index when that is not 0.

    A larger tensor has a file of its own. The files, and the folder `out` that they are in, or `out` itself.
    """
    entries = [entry_of(source, key) for key in source.keys()]  # noqa: SIM118
    if not most_bytes:
        write_tensors(out, entries, {"format": "pt"})
        return [out]
    out.mkdir(parents=True, exist_ok=True)
    shares = list(_shares(entries, most_bytes))
    names = [f"model-{number + 1:05d}-of-{len(shares):05d}.safetensors" for number in range(len(shares))]
    for name, share in zip(names, shares, strict=True):
        write_tensors(out / name, share, {"format": "pt"})
    places = {entry.key: name for name, share in zip(names, shares, strict=True) for entry in share}
    total = sum(entry.num_bytes for entry in entries)
    (out / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2))
    return [out / name for name in names]


def entry_of(source: Source, key: str) -> Entry:
    """The tensor of a source as an entry of a file."""
    return Entry(key, *source.like(key), lambda: source.tensor(key))


def _shares(entries: Iterable[Entry], most_bytes: int) -> Iterator[list[Entry]]:
    share, size = list[Entry](), 0
    for entry in entries:
        if share and size + entry.num_bytes > most_bytes:
            yield share
            share, size = [], 0
        share.append(entry)
        size += entry.num_bytes
    if share:
        yield share


class InMemory:
    """Tensors that are there already, such as a state_dict."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {key: value.detach() for key, value in tensors.items()}

    def keys(self) -> Iterator[str]:
        """Keys of all tensors."""
        return iter(self._tensors)

    def like(self, key: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of a tensor."""
        return self._tensors[key].dtype, tuple(self._tensors[key].shape)

    def tensor(self, key: str) -> Tensor:
        """The tensor."""
        return self._tensors[key]


def _broken(path: Path, what: str) -> FileError:
    return FileError(what, where=str(path), fix="give a .safetensors file, or a folder with one or with its index")
