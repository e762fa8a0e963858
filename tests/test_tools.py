"""The tools run as their docstrings say: by path, from a checkout, wherever one stands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parent.parent / "tools"
COMMANDS = sorted(path.name for path in TOOLS.glob("*.py") if "__main__" in path.read_text())


def test_all_measurements_are_commands() -> None:
    assert {"bench_inference.py", "bench_step.py", "get_data.py", "zoo.py"} <= set(COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_tool_runs_by_its_path_alone(name: str, tmp_path: Path) -> None:
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(TOOLS / name), "--help"]
    ended = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "Usage" in ended.stdout


@pytest.mark.slow
def test_no_damaged_file_is_taken_for_a_good_one(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOLS / "fuzz_files.py"), "--cases", "2000", "--folder", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stdout
    assert ", 0 failures, 0 crashes" in ended.stdout
    assert "bytes: refused" in ended.stdout
