"""Kernels that skip zeros on two ranks, which follow what the first of them chose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.kernels.needs import needs_kernels
from tests.runs import TASK, finish, weights

pytestmark = [
    needs_kernels,
    pytest.mark.distributed,
]
FLAGS = ("--batch-size", 32, "--micro-batch", 16, "--phase-epochs", 0.25, "--finetune-epochs", 0.25)


def run(out: Path, *flags: object) -> Path:
    code, _, err = finish("sparsify", TASK, "--out", out, *FLAGS, *flags)
    assert code == 0, err
    return out


@pytest.mark.parametrize("zero", [1, 3])
def test_two_ranks_end_as_with_dense_products_up_to_rounding(tmp_path: Path, zero: int) -> None:
    two = run(tmp_path / "two", "--kernels", "sparse", "--no-calibrate", "--nproc", 2, "--zero", zero)
    other = run(tmp_path / "expand", "--kernels", "expand", "--nproc", 2, "--zero", zero)
    assert '"sparse"' in (two / "plan.json").read_text()
    theirs = weights(other)
    for fqn, weight in weights(two).items():
        assert torch.equal(weight == 0, theirs[fqn] == 0), fqn
        torch.testing.assert_close(weight, theirs[fqn], rtol=1e-3, atol=1e-4)


def test_two_ranks_measure_once_and_agree(tmp_path: Path) -> None:
    two = run(tmp_path / "two", "--nproc", 2)
    plan = json.loads((two / "plan.json").read_text())
    assert {weight["kernel"] for group in plan["groups"] for weight in group["weights"]} == {"expand"}
