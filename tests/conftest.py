"""Fixtures for every test: golden texts, and one thread and one seed so that numbers repeat."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

# The programs under tools/ are tested too. Last, so that the installed gapfx comes before the one of the checkout.
sys.path.append(str(Path(__file__).parent.parent))

# Read when torch loads, in this process and in the ranks it starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# The same examples in every run, and no time limit on one: a busy machine is not a defect.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/*.txt with what came out")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden("name", text)` compares with tests/golden/name.txt, which `pytest --update-golden` rewrites."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        got = text.rstrip("\n") + "\n"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(got)
        elif not path.exists():
            pytest.fail(f"{path.name} does not exist: write it with `pytest --update-golden` and read it")
        assert got == path.read_text()

    return check


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Measured times go to a folder of the tests, here and in the processes that tests start."""
    os.environ["GAPFX_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def repeatable_torch() -> None:
    """One thread, deterministic kernels and a fixed seed, in tests that use torch."""
    if "torch" not in sys.modules:  # loading it here would cost seconds in tests that never touch it
        return
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
