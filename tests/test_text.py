"""Golden texts of graphs, diffs, plans and phase tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gapfx.capture import capture
from gapfx.plan import DenseWeight, Group, Plan, Weight
from gapfx.schedule import Budget, with_schedule
from gapfx.text import format_diff, format_graph, format_phases, format_plan

Golden = Callable[[str, str], None]


class Block(nn.Module):
    """Most kinds of node: leaves, reads, slices, dtypes, in-place writes, boxes, a module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.scale = nn.LayerNorm(4), nn.Linear(4, 4), nn.Parameter(torch.ones(4))
        self.order = {"generator": torch.Generator().manual_seed(0)}

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.linear(self.norm(x)))
        y[:, 1:3] = 0
        noise = torch.rand(4, generator=self.order["generator"], dtype=torch.float32)
        return F.gelu(y * self.scale).add_(noise).sum(dim=(0, 1), keepdim=True)


def recorded_text() -> str:
    model = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), Block())
    return format_graph(capture(model, lambda module: module(torch.randn(3, 2, 4))).graph_module)


def masked(*, with_mask: bool) -> fx.GraphModule:
    """A linear forward by hand, as rewrites see it."""
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.get_attr("weight")
    weight.meta["shape"] = (2, 4)
    if with_mask:
        weight = graph.call_function(torch.ops.aten.mul.Tensor, (weight, graph.get_attr("bits")))
    graph.output(graph.call_function(F.linear, (x, weight), {"bias": None}))
    root = nn.Linear(4, 2)
    root.register_buffer("bits", torch.ones(2, 4))
    return fx.GraphModule(root, graph)


def plan() -> Plan:
    weights = [Weight(f"blocks.{i}.mlp.weight", (64, 16 * (i + 1)), 0.9) for i in range(3)]
    tiled = dataclasses.replace(weights[2], pattern="2:4", sparsity=0.5)
    groups = Group("blocks.0-1", tuple(weights[:2])), Group("blocks.2", (tiled,))
    dense = tuple(DenseWeight(f"table.{i}.weight", (10, 4), "an embedding") for i in range(6))
    first = DenseWeight("stem.weight", (8, 3, 3, 3), "left dense by --dense 'stem.*'")
    return Plan(groups, (*dense, first), sparsity=0.9, partition="blocks")


def test_a_recorded_graph_prints_one_line_a_node(golden: Golden) -> None:
    golden("text_graph", recorded_text())


def test_the_text_of_a_graph_is_the_same_in_every_recording() -> None:
    text = recorded_text()
    assert text == recorded_text()
    assert "0x" not in text


def test_a_line_of_a_graph_depends_on_its_node_alone() -> None:
    lines = format_graph(masked(with_mask=False)).splitlines()
    kept = [line for line in format_graph(masked(with_mask=True)).splitlines() if line in lines]
    assert [line.split()[0] for line in kept] == ["x", "weight", "output"]


def test_a_diff_shows_what_a_rewrite_did(golden: Golden) -> None:
    golden("text_diff", format_diff(masked(with_mask=False), masked(with_mask=True)))


def test_the_diff_of_equal_texts_is_empty() -> None:
    text = format_graph(masked(with_mask=True))
    assert format_diff(text, text) == ""


def test_a_plan_prints_groups_exact_counts_and_reasons(golden: Golden) -> None:
    golden("text_plan", format_plan(plan()))


def test_a_plan_without_dense_weights_says_so() -> None:
    text = format_plan(dataclasses.replace(plan(), dense=()))
    assert text.endswith("no other parameter of two or more dimensions stays dense\n")


def test_a_plan_with_one_threshold_a_group_says_over_which_weights() -> None:
    assert "threshold" not in format_plan(plan())
    shared = format_plan(dataclasses.replace(plan(), allocation="global"))
    assert "\neach prune has one threshold a group, over " in shared


def test_a_gap_run_prints_its_phases(golden: Golden) -> None:
    golden("text_phases_gap", format_phases(with_schedule(plan(), "gap", Budget(2, 1000, 3000))))


@pytest.mark.parametrize(
    ("method", "kept"), [("dense", ["100.0%"]), ("oneshot", ["100.0%", "30.0%"]), ("static", ["30.0%"])]
)
def test_the_kept_share_counts_what_is_live_while_a_phase_trains(method: str, kept: list[str]) -> None:
    lines = format_phases(with_schedule(plan(), method, Budget(1, 10, 10))).splitlines()
    assert [line.split()[-1] for line in lines[1:]] == kept


def test_of_replicas_the_one_that_keeps_most_is_told() -> None:
    """Both groups have as many weights; the first keeps a tenth, the second, in runs of 2:4, a half."""
    lines = format_phases(with_schedule(plan(), "pgap", Budget(1, 10, 10, replicas=2))).splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["75.0%", "30.0%"]


def test_a_training_that_goes_on_from_the_middle_of_another_says_where_its_learning_rate_begins() -> None:
    lines = format_phases(with_schedule(plan(), "imp", Budget(1, 20, 10))).splitlines()
    found = [line.split("  restart ")[1].split("  ")[0] for line in lines[1:]]
    assert found == ["at 0 of 20", "at 2 of 20", "at 2 of 22", "at 2 of 12"]


def test_a_plan_without_phases_prints_the_header_alone() -> None:
    header = format_phases(plan())
    assert header == "phase  name  round  steps  grow  prune at end  state  lr  kept\n"
