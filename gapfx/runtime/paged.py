"""A model in files in place of memory, while it is built and captured.

At stage 3 no rank has room for the whole model, but a task builds it whole and the capture runs it. So what its
construction allocates lies in mapped files without a name, and the pages that were touched leave this process many
times a second. They stay in the system's page cache while it has room, else on the disk. Numbers are the same.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import threading
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode

from gapfx.errors import UserError

_LEAST_BYTES = 2**20
_MOST_BYTES = 64 * 2**20
_PERIOD_SECONDS = 0.02
_MADV_DONTNEED = 4
_STORAGE: Any = torch.UntypedStorage


@dataclass
class Pages:
    """Tensors whose memory is a file in `folder`."""

    folder: Path
    _refs: list[StorageWeakRef] = field(default_factory=list[StorageWeakRef])
    _touched: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def moved(self, tensor: Tensor, *, has_values: bool) -> Tensor:
        """The same tensor, in a file. Raises UserError when the disk has no room for it."""
        storage = self._made(tensor.untyped_storage().nbytes())
        if has_values:
            storage.copy_(tensor.untyped_storage())
        with self._lock:
            self._refs.append(StorageWeakRef(storage))
        return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, tensor.stride())

    def _made(self, nbytes: int) -> Any:
        try:
            handle, path = tempfile.mkstemp(prefix=".gapfx-", dir=self.folder)
        except OSError as error:
            raise self._refused(error) from error
        try:
            # A hole in the file would be a signal that kills the process, when the disk is full.
            os.posix_fallocate(handle, 0, nbytes)
            return _STORAGE.from_file(path, True, nbytes)
        except OSError as error:
            raise self._refused(error) from error
        finally:
            os.close(handle)
            os.unlink(path)

    def _refused(self, error: OSError) -> UserError:
        fix = "at ZeRO stage 3 each rank of a machine builds the model in a file there: make room for all of them"
        return UserError(f"no room for the model: {error}", where=str(self.folder), fix=fix)

    def touched(self, nbytes: int) -> None:
        """Drop them when this makes it many bytes since the last time."""
        self._touched += nbytes
        if self._touched >= _MOST_BYTES:
            self.drop()

    def drop(self) -> None:
        """Let go of the memory of all of them; what they hold is read again when it is needed."""
        with self._lock:
            self._touched = 0
            self._refs = [ref for ref in self._refs if not ref.expired()]
            for ref in self._refs:
                storage = _STORAGE._new_with_weak_ptr(ref.cdata)  # held, lest it is freed meanwhile
                if storage is not None:
                    _madvise()(storage.data_ptr(), storage.nbytes(), _MADV_DONTNEED)

    @contextmanager
    def leaving(self) -> Generator[None]:
        """Meanwhile they are dropped after the forwards of modules, and now and then for what else reads them."""
        done, drop = threading.Event(), self.drop

        def forward(module: nn.Module, *_: object) -> None:
            self.touched(sum(each.nbytes for each in module.parameters(recurse=False)))

        def now_and_then() -> None:
            while not done.wait(_PERIOD_SECONDS):
                drop()

        thread, hook = threading.Thread(target=now_and_then, daemon=True), register_module_forward_hook(forward)
        thread.start()
        try:
            yield
        finally:
            hook.remove()
            done.set()
            thread.join()
            drop()


class InFiles(TorchDispatchMode):
    """Meanwhile every large tensor that an op makes in memory lies in a file."""

    def __init__(self, pages: Pages) -> None:
        super().__init__()
        self.pages = pages

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        """What the op returns, in a file where it is new, plain and large."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.nbytes >= _LEAST_BYTES:
            self.pages.touched(result.nbytes)
            if _is_new(func) and _is_plain(result):
                return self.pages.moved(result, has_values=not str(func).startswith("aten.empty"))
        return cast(object, result)


def _is_new(op: Any) -> bool:
    return all(each.alias_info is None for each in op._schema.returns)


def _is_plain(tensor: Tensor) -> bool:
    if type(tensor) is not Tensor or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return False
    return tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.storage_offset() == 0


@contextmanager
def in_files(near: Path) -> Generator[InFiles | nullcontext[None]]:
    """A context for what builds a model: in files in the nearest folder that exists at or above `near`.

    What was built inside of it leaves memory as long as the outer context lasts, and can be used all the time. On other
    systems than Linux, where a mapped file may lose what it held, the model stays in memory.

    Raises UserError, inside, when the disk has no room for the model.
    """
    if sys.platform != "linux":
        yield nullcontext()
        return
    pages = Pages(next(folder for folder in (near, *near.absolute().parents) if folder.is_dir()))
    with pages.leaving():
        yield InFiles(pages)


@cache
def _madvise() -> Any:
    function: Any = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
