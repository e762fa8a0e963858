"""When the native kernels serve, and what is said when they do not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gapfx.kernels import native
from tests.kernels.needs import needs_kernels

SCRIPT = """
import torch
from gapfx.kernels import native
from gapfx.ops.expand import expand, gather
assert native.library() is None and native.level() == ""
print(native.missing_reason())
bits = torch.tensor([0b101], dtype=torch.uint8)
assert expand(torch.tensor([[1.0], [2.0]]), bits, [1, 3]).tolist() == [[1, 0, 2]]
assert gather(torch.tensor([[1.0, 5.0, 2.0]]), bits, [2, 1]).tolist() == [[1], [2]]
"""


def run(script: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_torch_serves_when_they_are_switched_off() -> None:
    assert run(SCRIPT, GAPFX_NATIVE="0") == "switched off (GAPFX_NATIVE=0)"


def test_another_word_than_those_it_knows_is_not_passed_over() -> None:
    script = (
        "from gapfx.kernels import native\ntry:\n    native.library()\nexcept ValueError as error:\n    print(error)"
    )
    wanted = "GAPFX_NATIVE is 'avx': it may be 0 (no native kernels) or portable, avx2 or avx512"
    assert run(script, GAPFX_NATIVE="avx") == wanted


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "not built: install gapfx where a C++ compiler is at hand"), (b"no library", "not loadable: ")],
)
def test_torch_serves_when_they_are_not_there(content: bytes | None, reason: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "_native.so").write_bytes(content)
    given = f"from pathlib import Path\nfrom gapfx.kernels import native\nnative.FOLDER = Path({str(tmp_path)!r})\n"
    assert run(given + SCRIPT, GAPFX_NATIVE="").startswith(reason)


@needs_kernels
def test_they_take_values_of_two_four_and_eight_bytes_on_the_cpu() -> None:
    assert native.can_take(torch.ones(1), torch.ones(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.float64))
    assert not native.can_take(torch.ones(1, dtype=torch.int8))
    assert not native.can_take(torch.ones(1, device="meta"))
