"""What `gapfx.load` gives, under torch.compile as users call it: machine code around the kernels, no graph break."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gapfx.kernels.decode import MAX_TOKENS
from gapfx.loading import load_run
from tests.kernels.needs import excuse
from tests.tasks.classify import Net
from tests.test_loading import Tied, a_run_of

COMPILER = os.environ.get("CXX", "g++")  # as inductor asks for it
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"inductor needs a C++ compiler, {COMPILER} is missing"),
]
BATCHES = (1, 3, MAX_TOKENS, MAX_TOKENS + 1, 64)  # few tokens and many go to different kernels
# Shares of the largest output: inductor rounds once where eager rounds after each op, and what int8 then rounds to 127
# levels may fall on another one.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-5}
OF_LEVELS = 2**-5


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv1d(6, 16, 3, padding=1), nn.ReLU(), nn.Conv1d(16, 5, 3, stride=2))


def rows(batch: int) -> Tensor:
    return torch.randn(batch, 8)


def signals(batch: int) -> Tensor:
    return torch.randn(batch, 6, 12)


def words(batch: int) -> Tensor:
    return torch.arange(batch)[:, None] % 24


def assert_compiled_equals_eager(loaded: nn.Module, inputs: list[Tensor], tolerance: float) -> None:
    torch.compiler.reset()
    compiled: Any = torch.compile(loaded, fullgraph=True)  # a graph break is an error
    for x in inputs:
        found, wanted = compiled(x), loaded(x)
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("values", ["fp32", "bf16", "int8"])
def test_few_tokens_and_many_equal_eager_in_every_type(values: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    path = a_run_of(tmp_path / "run", Net(), (rows(4),), sparsity=0.8)
    loaded = load_run(path, model=Net, args=(rows(4),), values=values)
    few, many = (loaded.kernel("blocks.0.up.weight", tokens) for tokens in (MAX_TOKENS, MAX_TOKENS + 1))
    assert few != many or excuse()
    tolerance = max(TOLERANCES[dtype], OF_LEVELS if values == "int8" else 0.0)
    assert_compiled_equals_eager(loaded.module.to(dtype), [rows(batch).to(dtype) for batch in BATCHES], tolerance)


@pytest.mark.parametrize(("model", "inputs"), [(convolutions, signals), (Tied, words)], ids=["convolutions", "tied"])
def test_convolutions_and_tied_weights_equal_eager(
    model: Callable[[], nn.Module], inputs: Callable[[int], Tensor], tmp_path: Path
) -> None:
    path = a_run_of(tmp_path / "run", model(), (inputs(4),), sparsity=0.8, dense=())
    loaded = load_run(path, model=model, args=(inputs(4),))
    assert loaded.weights
    assert_compiled_equals_eager(loaded.module, [inputs(batch) for batch in BATCHES], 1e-5)
