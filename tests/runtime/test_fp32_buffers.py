"""What a task hears whose model cannot train in bf16 because its buffers stay fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from gapfx.errors import TaskError
from gapfx.runtime.fp32_buffers import telling_of_buffers
from tests.runs import gapfx

TASK = """
from tests.tasks.classify import *
from tests.tasks.classify import Net as Plain


class Net(Plain):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(16)


def model():
    return Net()
"""
DTYPES = "loss() failed: RuntimeError: expected scalar type BFloat16 but found Float"


@pytest.mark.parametrize("zero", [1, 3])
def test_a_batch_norm_in_bf16_is_named_with_what_to_do(
    zero: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = tmp_path / "task.py"
    task.write_text(TASK)
    assert gapfx("sparsify", task, "--out", tmp_path / "run", "--dtype", "bf16", "--zero", zero) == 2
    told = capsys.readouterr().err
    assert f"error: {DTYPES}" in told
    assert "in bf16 buffers stay fp32, here those of BatchNorm1d: a BatchNorm" in told
    assert "Use another norm, such as GroupNorm or LayerNorm" in told


@pytest.mark.parametrize(
    ("module", "message"),
    [(nn.GroupNorm(2, 4), DTYPES), (nn.BatchNorm1d(4), "loss() failed: ValueError: a Float of the user")],
    ids=["no buffers", "another failure"],
)
def test_other_failures_are_told_as_they_are(module: nn.Module, message: str) -> None:
    error = TaskError(message, fix="mend the task")
    with pytest.raises(TaskError) as caught, telling_of_buffers(module.to(torch.float32)):
        raise error
    assert caught.value is error
