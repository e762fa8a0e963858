"""Loads the library of native kernels and calls it with tensors; without the library torch serves instead."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from gapfx.kernels import setting
from gapfx.kernels.setting import LEVELS

ABI = 5
SIZES = (2, 4, 8)
FOLDER = Path(__file__).parent


@cache
def library() -> ctypes.CDLL | None:
    """The kernels, or None where they were not built, do not load, or are switched off with GAPFX_NATIVE=0.

    GAPFX_NATIVE may also name a level of instructions that they shall not go beyond; another word is a ValueError.
    """
    if missing_reason():
        return None
    found, highest = _open(_files()[0]), setting.highest_level()
    if highest:
        found.gapfx_use_level(LEVELS.index(highest))
    return found


def needed() -> ctypes.CDLL:
    """The kernels, where somebody has asked before whether they are there."""
    found = library()
    assert found is not None
    return found


@cache
def missing_reason() -> str:
    """Why there are no native kernels; "" when there are."""
    if setting.problem():
        raise ValueError(setting.problem())
    if setting.is_off():
        return "switched off (GAPFX_NATIVE=0)"
    if not _files():
        return "not built: install gapfx where a C++ compiler is at hand"
    try:
        found = _open(_files()[0])
    except OSError as error:
        return f"not loadable: {error}"
    return "" if found.gapfx_abi() == ABI else "built by another version of gapfx: install it again"


def level() -> str:
    """Which instructions the kernels use here: portable, avx2 or avx512; "" without kernels."""
    found = library()
    return LEVELS[found.gapfx_level()] if found else ""


def can_take(*tensors: Tensor) -> bool:
    """Whether the kernels work on these tensors: on the CPU, values of 2, 4 or 8 bytes."""
    return library() is not None and all(t.device.type == "cpu" and t.element_size() in SIZES for t in tensors)


def check_size(what: str, tensor: Tensor | None, numel: int) -> None:
    """Raise RuntimeError where a kernel that reads `numel` elements would not find as many."""
    if tensor is not None and tensor.numel() != numel:
        raise RuntimeError(f"{what} should have {numel} elements, it has {tensor.numel()}")


def expand(values: Tensor, bits: Tensor, dense: Tensor) -> None:
    """Write `dense` (contiguous): the next of `values` where its bit is 1, else 0."""
    _call("gapfx_expand", values.contiguous(), bits, dense, dense)


def gather(dense: Tensor, bits: Tensor, values: Tensor) -> None:
    """Write `values` (contiguous): those of `dense` whose bit is 1, in order."""
    _call("gapfx_gather", dense, bits, values, dense)


def can_pack(tensor: Tensor) -> bool:
    """Whether `pack` and `unpack` work on it: a plain tensor on the CPU, outside of torch.func, which wraps them."""
    if type(tensor) is not Tensor or tensor.device.type != "cpu" or library() is None:
        return False
    return torch._C._functorch.maybe_current_level() is None  # pyright: ignore


def pack(mask: Tensor, bits: Tensor) -> None:
    """Write `bits` (contiguous), one for each element of a contiguous bool `mask`; spare ones are 0."""
    needed().gapfx_pack(_address(mask), _address(bits), mask.numel(), torch.get_num_threads())


def unpack(bits: Tensor, mask: Tensor) -> None:
    """Write the bool `mask` (contiguous) from its bits."""
    check_size("the bits of a mask", bits, (mask.numel() + 7) // 8)
    needed().gapfx_unpack(_address(bits), _address(mask), mask.numel(), torch.get_num_threads())


def count(bits: Tensor, numel: int) -> int:
    """Number of 1 bits among the first `numel`."""
    return needed().gapfx_count(_address(bits), numel)


def _call(name: str, source: Tensor, bits: Tensor, target: Tensor, dense: Tensor) -> None:
    function = getattr(library(), name)
    check_size("the bits of a mask", bits, (dense.numel() + 7) // 8)
    threads = torch.get_num_threads()
    status: int = function(
        _address(source), _address(bits), _address(target), dense.numel(), dense.element_size(), threads
    )
    if status:
        raise TypeError(f"{name} takes values of 2, 4 or 8 bytes, not {dense.dtype}")


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _files() -> list[Path]:
    return sorted(FOLDER.glob("_native*.so"))


@cache
def _open(path: Path) -> ctypes.CDLL:
    # After torch, whose OpenMP runtime it then shares.
    found = ctypes.CDLL(str(path))
    three, size = [ctypes.c_void_p] * 3, [ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    found.gapfx_expand.argtypes = found.gapfx_gather.argtypes = three + size
    found.gapfx_count.argtypes, found.gapfx_count.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_int64
    found.gapfx_pack.argtypes = found.gapfx_unpack.argtypes = [ctypes.c_void_p] * 2 + size[::2]
    found.gapfx_use_level.argtypes = [ctypes.c_int]
    return found
