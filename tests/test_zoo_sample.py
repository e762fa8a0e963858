"""Models of every library of the zoo pass every check; what their libraries are not installed for is skipped."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.zoo import LIBRARIES, load_cases, sample_names
from tools.zoo_cases.two_ranks import TWO_RANKS

ZOO = Path(__file__).parent.parent / "tools" / "zoo.py"
# How many models of each library are checked, at least: a case that is lost from a sample is a failure.
AT_LEAST = {
    "hand-made": 40,
    "timm": 14,
    "torchvision": 12,
    "diffusers": 6,
    "torch_geometric": 8,
    "transformers": 25,
}
# Where the libraries must be there, as on the machine that checks every change.
IS_REQUIRED = os.environ.get("GAPFX_ZOO") == "required"


def sweep(library: str, path: Path, *flags: str) -> list[dict[str, Any]]:
    if library != "hand-made" and importlib.util.find_spec(library) is None and not IS_REQUIRED:
        pytest.skip(f"{library} is not installed: pip install -c constraints.txt -e '.[zoo]'")
    command = [sys.executable, str(ZOO), "sweep", library, "--results", str(path), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in path.read_text().splitlines()]


def faults(rows: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    return {row["key"]: row["failures"] for row in rows if row["status"] != "passed"}


def test_the_sample_has_every_library() -> None:
    assert set(AT_LEAST) == set(TWO_RANKS) == set(LIBRARIES)
    assert sum(AT_LEAST.values()) >= 60


@pytest.mark.slow
@pytest.mark.timeout(900)  # twenty models and more, on a machine that may be slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_the_sample_of_a_library_passes_every_check(library: str, tmp_path: Path) -> None:
    rows = sweep(library, tmp_path / "zoo.jsonl", "--sample")
    assert faults(rows) == {}
    assert len(rows) >= AT_LEAST[library]


@pytest.mark.distributed
@pytest.mark.parametrize(("library", "name"), [("hand-made", "routed-experts"), ("transformers", "t5")])
def test_two_ranks_get_the_mean_of_both_gradients(library: str, name: str, tmp_path: Path) -> None:
    rows = sweep(library, tmp_path / "zoo.jsonl", "--two-ranks", "--only", f"*/{name}")
    assert [row["key"] for row in rows] == [f"{library}/{name} on two ranks"]
    assert faults(rows) == {}


def test_samples_name_cases_that_exist() -> None:
    names = {case.name for case in load_cases("hand-made")}
    assert set(sample_names("hand-made")) <= names
    assert set(TWO_RANKS["hand-made"].split()) <= names
