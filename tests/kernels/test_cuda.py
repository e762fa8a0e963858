"""Triton's expand and gather against torch: on CUDA, and without one on the CPU, by Triton's interpreter.

The interpreter is chosen when Triton is imported, so those tests run in a process of their own.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import os
import subprocess
import sys
import weakref

import pytest
import torch
from torch import Tensor

from gapfx.masks import pack, unpack
from gapfx.ops.expand import expand, gather
from gapfx.ops.linear import linear
from tests.ops.compact import a_weight, assert_bitwise

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IS_REQUIRED = os.environ.get("GAPFX_TRITON") == "required"
HAS_TRITON = IS_REQUIRED or importlib.util.find_spec("triton") is not None
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed: pip install '.[triton]'")
on_each_device = pytest.mark.parametrize(
    "device", ["cpu"] if IS_INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
)

SIZES = (1, 7, 8, 9, 31, 32, 33, 127, 1023, 1024, 1025, 3000, 4096)
SHARES = (0, 0.1, 0.5, 1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SENTINEL = 7.0


@pytest.mark.skipif(IS_INTERPRETED, reason="this is the process with the interpreter")
def test_all_of_this_file_holds_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def a_mask(size: int, share: float) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(size)) < share


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_go_where_their_bits_are_and_nowhere_else(device: str, dtype: torch.dtype) -> None:
    from gapfx.kernels import cuda

    for size, share in itertools.product(SIZES, SHARES):
        mask = a_mask(size, share).to(device)
        dense, num = torch.randn(size).to(device, dtype), int(mask.sum())
        values, expanded = (torch.full((n + 8,), SENTINEL, dtype=dtype, device=device) for n in (num, size))
        cuda.gather(dense, pack(mask), values[:num])
        cuda.expand(values[:num], pack(mask), expanded[:size])
        assert torch.equal(values[:num], dense[mask])
        assert torch.equal(expanded[:size], torch.where(mask, dense, 0))
        assert bool((values[num:] == SENTINEL).all())
        assert bool((expanded[size:] == SENTINEL).all())


@on_each_device
def test_every_bit_of_a_value_arrives(device: str) -> None:
    words = torch.tensor([0x7FC00001, -0x00400000, 0x7F800000, -0x80000000, 1, 0x7F800001], dtype=torch.int32)
    special = words.view(torch.float32).repeat(20).to(device)
    mask = a_mask(120, 0.5).to(device)
    values = gather(special, pack(mask), [int(mask.sum()), 1])
    dense = expand(values, pack(mask), [120])
    assert torch.equal(values.view(torch.int32).flatten(), special.view(torch.int32)[mask])
    assert torch.equal(dense.view(torch.int32), torch.where(mask, special.view(torch.int32), 0))


@on_each_device
def test_a_dtype_changes_on_the_way(device: str) -> None:
    from gapfx.kernels import cuda

    mask = a_mask(3000, 0.3).to(device)
    values = torch.randn(int(mask.sum()), device=device)
    if IS_INTERPRETED:  # it cuts what devices round
        values = values.bfloat16().float()
    dense, back = torch.empty(3000, dtype=torch.bfloat16, device=device), torch.empty_like(values)
    cuda.expand(values, pack(mask), dense)
    cuda.gather(dense, pack(mask), back)
    assert torch.equal(dense[mask], values.bfloat16())
    assert torch.equal(back, values.bfloat16().float())


@on_each_device
def test_spare_bits_of_the_last_byte_are_no_weights(device: str) -> None:
    bits = torch.tensor([255], dtype=torch.uint8, device=device)
    assert gather(torch.arange(3.0, device=device), bits, [3]).tolist() == [0, 1, 2]
    assert expand(torch.arange(1.0, 4.0, device=device), bits, [3]).tolist() == [1, 2, 3]


@on_each_device
def test_no_weights_are_no_work(device: str) -> None:
    bits = torch.empty(0, dtype=torch.uint8, device=device)
    assert expand(torch.empty(0, 1, device=device), bits, [0, 4]).shape == (0, 4)


@on_each_device
def test_a_mask_that_was_written_is_counted_again(device: str) -> None:
    first, second = (pack(a_mask(4000, share)).to(device) for share in (0.2, 0.7))
    bits = first.clone()
    for wanted in (first, second, first):
        bits.copy_(wanted)
        dense = torch.arange(1.0, 4001.0, device=device)
        live = unpack(wanted, (4000,))
        values = gather(dense, bits, [int(live.sum())])
        assert torch.equal(values, dense[live])
        assert torch.equal(expand(values, bits, [4000]), torch.where(live, dense, 0))


@on_each_device
def test_a_part_of_a_mask_has_tiles_of_its_own(device: str) -> None:
    mask = a_mask(4096, 0.4).to(device)
    bits, dense = pack(mask), torch.randn(4096, device=device)
    for start in (0, 8, 1024, 2056):
        part = mask[start:]
        assert torch.equal(gather(dense[start:], bits[start // 8 :], [int(part.sum())]), dense[start:][part])


@on_each_device
def test_masks_without_a_version_serve_too(device: str) -> None:
    with torch.inference_mode():
        mask = a_mask(2000, 0.4).to(device)
        dense = torch.randn(2000, device=device)
        assert torch.equal(gather(dense, pack(mask), [int(mask.sum())]), dense[mask])


@on_each_device
def test_a_mask_that_nobody_holds_is_freed_with_its_counts(device: str) -> None:
    mask = a_mask(4096, 0.4).to(device)
    bits = pack(mask)
    gather(torch.randn(4096, device=device), bits, [int(mask.sum())])
    counts = weakref.ref(bits.untyped_storage().gapfx_tiles.before)  # pyright: ignore[reportAttributeAccessIssue]
    del bits
    gc.collect()  # the interpreter's own cycles
    assert counts() is None


@on_each_device
def test_a_compact_layer_gives_what_a_masked_one_gives(device: str) -> None:
    torch.set_default_device(device)
    try:
        weight, x, bias = a_weight(33, 70), torch.randn(5, 70), torch.randn(33)
        assert_bitwise(
            weight,
            lambda values, x, bias: linear(x, values, weight.bits, bias, (33, 70)),
            lambda dense, x, bias: torch.nn.functional.linear(x, dense, bias),
            x,
            bias,
        )
    finally:
        torch.set_default_device(None)
