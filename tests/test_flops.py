"""Operations of forwards on models whose number is known, and of plans by their live shares."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gapfx.flops import ForwardFlops, count_forward, live_shares, training_flops
from gapfx.plan import Group, Plan, Weight
from gapfx.schedule import Budget, with_schedule


class Mixed(nn.Module):
    """A convolution, attention with tied in-projections, and a linear layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, groups=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.twice = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).flatten(2).transpose(1, 2)
        y, _ = self.attention(y, y, y, need_weights=False)
        return self.twice(self.twice(y))


class Experts(nn.Module):
    """Rows sorted by expert, each met by the weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 32, 16, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.tensor([8, 8, 24, 40], dtype=torch.int32)
        return F.grouped_mm(x, self.weight.transpose(-2, -1), offs=ends)


def test_a_row_costs_the_product_with_one_expert() -> None:
    found = count_forward(Experts(), lambda model: model(torch.randn(40, 16, dtype=torch.bfloat16)))
    assert found.by_weight == {"weight": found.total} == {"weight": 2 * 40 * 16 * 32}


def test_operations_of_each_weight_are_those_of_its_products() -> None:
    batch, positions = 2, 16
    found = count_forward(Mixed(), lambda model: model(torch.randn(batch, 3, 4, 4)))
    rows = batch * positions
    assert found.by_weight == {
        "conv.weight": 2 * rows * 8 * 27,
        "attention.in_proj_weight": 2 * rows * 24 * 8,
        "attention.out_proj.weight": 2 * rows * 8 * 8,
        "twice.weight": 2 * 2 * rows * 8 * 8,
    }
    scores = 2 * 2 * batch * 2 * positions * positions * 4
    assert found.total == sum(found.by_weight.values()) + scores


def test_counting_leaves_the_model_as_it_was() -> None:
    model = nn.Linear(4, 4)
    before = model.weight.clone()
    count_forward(model, lambda m: F.mse_loss(m(torch.ones(2, 4)), torch.ones(2, 4)))
    assert torch.equal(model.weight, before)
    assert model.weight.grad is None


SIZES = {f"{i}.weight": 100 for i in range(3)}


def plan_of(method: str, rounds: int = 2) -> Plan:
    groups = tuple(Group(f"g{i}", (Weight(f"{i}.weight", (10, 10), 0.9),)) for i in range(3))
    return with_schedule(Plan(groups), method, Budget(rounds, phase_steps=10, finetune_steps=20))


def rounded(plan: Plan) -> list[list[list[float]]]:
    return [[[round(share, 3) for share in shares] for shares in replicas] for _, replicas in live_shares(plan, SIZES)]


def test_one_group_is_dense_at_a_time_in_gap() -> None:
    assert rounded(plan_of("gap", rounds=1)) == [
        [[1.0, 0.1, 0.1]],
        [[0.1, 1.0, 0.1]],
        [[0.1, 0.1, 1.0]],
        [[0.1, 0.1, 0.1]],
    ]


def test_what_gmp_has_pruned_stays_pruned_and_goes_further() -> None:
    found = rounded(plan_of("gmp", rounds=1))
    assert found == [[[1.0] * 3], [[0.367] * 3], [[0.133] * 3], [[0.1] * 3]]


def test_every_replica_of_parallel_gap_counts() -> None:
    found = rounded(plan_of("pgap", rounds=1))
    assert found == [[[1.0, 0.1, 0.1], [0.1, 1.0, 0.1], [0.1, 0.1, 1.0]], [[0.1, 0.1, 0.1]]]


@pytest.mark.parametrize(
    ("method", "share"),
    [("dense", 1.0), ("static", 0.1), ("gap", (60 * (1.2 / 3) + 20 * 0.1) / 80), ("oneshot", (60 + 20 * 0.1) / 80)],
)
def test_a_training_costs_three_forwards_a_step_at_its_live_share(method: str, share: float) -> None:
    forward = ForwardFlops(1000, {"0.weight": 300, "1.weight": 300, "2.weight": 300})
    assert training_flops(plan_of(method), forward) == pytest.approx(3 * 80 * (100 + 900 * share))


def test_each_weight_counts_by_its_own_sparsity_however_weights_are_grouped() -> None:
    """What costs most operations is not what has most elements: 0.9 of 600 and 0.5 of 300."""
    weights = Weight("many.weight", (100, 100), 0.9), Weight("few.weight", (10, 10), 0.5)
    forward = ForwardFlops(1000, {"few.weight": 600, "many.weight": 300})
    apart, together = Plan(tuple(Group(w.fqn, (w,)) for w in weights)), Plan((Group("all", weights),))
    for plan in (apart, together):
        static = with_schedule(plan, "static", Budget(1, 10, 10))
        num_steps = static.num_steps
        assert training_flops(static, forward) == pytest.approx(3 * num_steps * (100 + 600 * 0.5 + 300 * 0.1))


def test_a_group_that_no_product_reads_costs_nothing() -> None:
    forward = ForwardFlops(700, {"0.weight": 300, "1.weight": 300})
    assert training_flops(plan_of("static"), forward) == pytest.approx(3 * 80 * (100 + 600 * 0.1))


def test_a_softened_training_has_sparse_forwards_and_dense_gradients_of_the_weights() -> None:
    forward = ForwardFlops(1000, {"0.weight": 300, "1.weight": 300, "2.weight": 300})
    ramp, hold = 100 + 900 * (1 - 0.9 * 3 / 4), 100 + 900 * 0.1
    assert training_flops(plan_of("st3"), forward) == pytest.approx(60 * (2 * ramp + 1000) + 20 * (2 * hold + 1000))


def test_an_update_by_gradients_costs_a_dense_gradient_more() -> None:
    forward = ForwardFlops(1000, {"0.weight": 300, "1.weight": 300, "2.weight": 300})
    random, steepest = (
        with_schedule(plan_of("static"), method, Budget(2, 10, 20, update_steps=15)) for method in ("set", "rigl")
    )
    assert training_flops(random, forward) == pytest.approx(3 * 80 * (100 + 900 * 0.1))
    num_updates = sum(phase.drop > 0 for phase in steepest.phases)
    assert num_updates == 3
    more = training_flops(steepest, forward) - training_flops(random, forward)
    assert more == pytest.approx(num_updates * (2 * (100 + 900 * 0.1) + 1000))
