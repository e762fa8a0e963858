"""Masks cut over two ranks at ZeRO 3: a run ends as with whole masks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.runs import TASK, finish, weights
from tests.runtime.cut_all import CUT_ALL

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("task", ["classify", "sequences", "recomputed"])
def test_masks_that_are_cut_over_two_ranks_end_as_whole_ones(task: str, tmp_path: Path) -> None:
    cut = tmp_path / "cut.json"
    cut.write_text(json.dumps({"zero_optimization": CUT_ALL}))
    for zero, flags in ((1, ()), (3, ("--deepspeed", cut))):
        out = tmp_path / str(zero)
        common = ("--out", out, "--nproc", 2, "--clip", 0, "--zero", zero, "--kernels", "expand")
        code, _, err = finish("sparsify", TASK.with_name(f"{task}.py"), *common, *flags)
        assert code == 0, err
    ours, theirs = weights(tmp_path / "3"), weights(tmp_path / "1")
    for fqn, value in theirs.items():
        # MKL's sums in an LSTM depend on where its operands lie in memory.
        torch.testing.assert_close(ours[fqn], value, rtol=0, atol=1e-5 if task == "sequences" else 0)
        assert torch.equal(ours[fqn] == 0, value == 0)
