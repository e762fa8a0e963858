"""Ranks that come to other weights in one step are told so, before their gradients are added up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gapfx.errors import TaskError
from gapfx.runtime.ranks import Peers
from gapfx.runtime.same_weights import SameWeights, reached
from tests.runs import finish
from tests.runtime.threads import on_ranks

EXPERTS = """
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

defaults = {"groups": 2, "phase_epochs": 0.5, "finetune_epochs": 0.5, "batch_size": 16, "calibrate": False}


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts, self.head = nn.ModuleList(nn.Linear(16, 16) for _ in range(2)), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.experts[int(x[0, 0] > 0)](x))


def model():
    return Experts()


def data(split):
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x[:, :4].argmax(1))


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])
"""


def test_what_a_loss_comes_to_is_what_its_backward_gives_a_gradient() -> None:
    model = nn.ModuleDict({name: nn.Linear(3, 3) for name in ("used", "unused", "frozen")})
    model["frozen"].requires_grad_(False)
    loss = model["used"](model["frozen"](torch.ones(2, 3))).sum()
    found = reached(loss)
    loss.backward()
    assert found == {id(p) for p in model.parameters() if p.grad is not None}


def told(is_each: bool, takes: list[tuple[str, str]]) -> list[str]:
    """What each of two ranks hears whose micro-batches take these experts."""

    def train(peers: Peers) -> str:
        experts = {name: torch.ones(3, requires_grad=True) for name in "ab"}
        same = SameWeights(experts, peers, is_each)
        try:
            for number, names in enumerate(takes):
                loss: Tensor = experts[names[peers.rank]].sum()
                same.check(loss, is_last=number == len(takes) - 1)
        except TaskError as error:
            return error.what
        return ""

    return on_ranks(2, train)


@pytest.mark.parametrize("is_each", [True, False])
def test_ranks_that_take_other_experts_all_hear_of_it(is_each: bool) -> None:
    assert told(is_each, [("a", "a"), ("b", "b")]) == ["", ""]
    heard = told(is_each, [("a", "b")])
    assert heard == ["some of the 2 ranks trained a and 1 more in this step, and others did not"] * 2


def test_once_a_step_all_micro_batches_count_together() -> None:
    takes = [("a", "b"), ("b", "a")]
    assert told(False, takes) == ["", ""]
    assert all(told(True, takes))


def test_one_rank_and_stages_that_need_it_not_look_at_nothing() -> None:
    assert SameWeights.of({}, Peers(), 1) is None
    assert (
        on_ranks(2, lambda peers: [SameWeights.of({}, peers, stage) is None for stage in range(4)])
        == [[True, False, False, True]] * 2
    )


@pytest.mark.distributed
@pytest.mark.parametrize(("zero", "status"), [(0, 0), (1, 2), (2, 2)])
def test_a_run_whose_ranks_take_other_experts_ends_with_one_message(zero: int, status: int, tmp_path: Path) -> None:
    (tmp_path / "experts.py").write_text(EXPERTS)
    code, _, err = finish("sparsify", tmp_path / "experts.py", "--out", tmp_path / "run", "--nproc", 2, "--zero", zero)
    assert code == status, err
    assert ("an expert that was sent nothing on an empty batch" in err) is (status == 2)
