"""The kernels under the sanitizers of addresses and undefined behaviour, at every level of instructions.

All sources and `sanitized.cpp`, a table of calls on odd sizes whose buffers end where the kernels must stop, become one
program; any report ends it with an error.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gapfx.kernels import native

COMPILER = shutil.which("g++") or shutil.which("c++") or ""
EXPORT = re.compile(r"GAPFX_API [\w:*]+\s+(gapfx_(?!abi|level)\w+)\(")
FLAGS = ("-std=c++17", "-O1", "-g", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# Threads of OpenMP keep their memory until the process ends.
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1", "OMP_NUM_THREADS": "3"}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("sanitized") / "sanitized"
    sources = [*sorted(native.FOLDER.glob("*.cpp")), Path(__file__).with_name("sanitized.cpp")]
    command = [COMPILER, *FLAGS, *map(str, sources), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def test_every_exported_kernel_is_called() -> None:
    exported = {name for path in native.FOLDER.glob("*.cpp") for name in EXPORT.findall(path.read_text())}
    called = Path(__file__).with_name("sanitized.cpp").read_text()
    assert {"gapfx_expand", "gapfx_decode", "gapfx_convolution_forward"} <= exported
    missing = [name for name in exported if len(re.findall(rf"\b{name}\(", called)) < 2]
    assert missing == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not COMPILER, reason="no compiler")
@pytest.mark.parametrize("level", range(len(native.LEVELS)), ids=native.LEVELS)
def test_nothing_is_reported(program: Path, level: int) -> None:
    done = subprocess.run([program, str(level)], env=os.environ | OPTIONS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("done\n") or done.stdout == "this processor lacks the instructions\n"
