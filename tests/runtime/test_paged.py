"""A model that is built in files: the same numbers, little memory, and nothing left on the disk."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gapfx.errors import UserError
from gapfx.runtime.paged import in_files
from tests.runs import ROOT, events, finish, summary

SIDE = 1024  # a weight of 4 MiB
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only there is the model put into files, see in_files")
PEAK = """
import re, sys
from contextlib import nullcontext
from pathlib import Path
import torch
from torch import nn
from gapfx.runtime.paged import in_files
def peak():  # not getrusage, which counts the process before exec too
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
nn.Linear(1024, 1024)(torch.ones(1, 1024))
before = peak()
with in_files(Path(sys.argv[2])) if sys.argv[1] == "files" else nullcontext(nullcontext()) as building:
    with building:
        model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(160)])
    for _ in range(2):
        model(torch.ones(1, 1024))
print((peak() - before) / 1024)
"""


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(SIDE, SIDE), nn.Linear(SIDE, SIDE, bias=False)
        self.head.weight = self.table.weight


class ByHand(nn.Module):
    """Parameters that are views of one tensor, and one that is filled through another name after it was registered."""

    def __init__(self) -> None:
        super().__init__()
        both = torch.Tensor(2 * SIDE, SIDE)
        self.first, self.second = nn.Parameter(both[:SIDE]), nn.Parameter(both[SIDE:])
        both.normal_()
        raw = torch.zeros(SIDE, SIDE)
        self.third = nn.Parameter(raw)
        raw.copy_(torch.randn(SIDE, SIDE).triu())
        self.table = nn.Buffer(torch.randn(SIDE, SIDE).t())
        self.fourth = nn.Parameter(torch.randn(SIDE, 1).expand(SIDE, SIDE).contiguous())
        nn.init.orthogonal_(self.fourth)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.first @ self.second @ self.third @ self.fourth @ self.table


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(SIDE, SIDE), nn.Linear(SIDE, SIDE)).apply(drawn_again),
    "tied": Tied,
    "recurrent": lambda: nn.LSTM(SIDE, SIDE),
    "transformer": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True), 2),
    "convolution": lambda: nn.Conv2d(512, 512, 3),
    "by hand": ByHand,
    "half": lambda: nn.Linear(SIDE, SIDE).to(torch.bfloat16),
}


WIDE = """
from tests.tasks.classify import *


def model():
    return Net(512)
"""


def drawn_again(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)


def built(model: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return model()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_built_in_files_is_the_model_built_in_memory(name: str, tmp_path: Path) -> None:
    wanted = built(MODELS[name]).state_dict()
    with in_files(tmp_path) as building:
        with building:
            model = built(MODELS[name])
        found = model.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], value) for key, value in wanted.items())
        assert all(found[key].stride() == value.stride() for key, value in wanted.items())
    assert all(torch.equal(model.state_dict()[key], value) for key, value in wanted.items()), "also afterwards"
    assert list(tmp_path.iterdir()) == []


def test_names_of_one_memory_still_see_the_same(tmp_path: Path) -> None:
    with in_files(tmp_path) as building:
        with building:
            model = Tied()
        with torch.no_grad():
            model.head.weight[0, 0] = 7.0
        assert float(model.table.weight.detach()[0, 0]) == 7.0


@on_linux
def test_building_and_running_a_large_model_takes_a_fraction_of_its_size(tmp_path: Path) -> None:
    def peak_mib(where: str) -> float:
        command = [sys.executable, "-c", PEAK, where, str(tmp_path)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return float(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=env).stdout)

    assert peak_mib("memory") > 600, "the model itself"
    assert peak_mib("files") < 300


@on_linux
def test_a_full_disk_is_told_before_anything_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with (
        pytest.raises(UserError, match=r"no room for the model: .*No space left") as caught,
        in_files(tmp_path) as building,
        building,
    ):
        nn.Linear(SIDE, SIDE)
    assert caught.value.where == str(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_may_be_one_that_the_run_will_make(tmp_path: Path) -> None:
    with in_files(tmp_path / "runs" / "first") as building, building:
        nn.Linear(SIDE, SIDE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.distributed
def test_a_run_at_stage_3_starts_from_the_weights_that_others_start_from(tmp_path: Path) -> None:
    task = tmp_path / "task.py"
    task.write_text(WIDE)
    for stage in (1, 3):
        flags = ("--zero", stage, "--nproc", 2, "--rounds", 1, "--log-every", 1, "--eval-epochs", 0)
        code, _, err = finish("sparsify", task, "--out", tmp_path / f"stage-{stage}", *flags)
        assert code == 0, err
    ours, theirs = tmp_path / "stage-3", tmp_path / "stage-1"
    assert events(ours, "step")[0]["loss"] == pytest.approx(events(theirs, "step")[0]["loss"], abs=1e-6)
    assert summary(ours)["sparsity_actual"] == summary(theirs)["sparsity_actual"]
    assert {path.name for path in tmp_path.iterdir()} == {"task.py", "stage-1", "stage-3"}
