"""What a figure leaves out, what stands beside what, and that nothing lies on anything else."""

from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from gapfx.figure.boxes import Box, Cell, Item
from gapfx.figure.drawing import arrow, chip_width, label_width, rounded
from gapfx.figure.graph import figure_graph, site_of
from gapfx.figure.labels import label_lines, num_places, shorten, weight_name
from gapfx.figure.lines import Sizes, best_columns, box_lines
from gapfx.figure.page import find_ports
from gapfx.figure.routes import Point, route
from gapfx.figure.svg import draw
from gapfx.figure.tracks import Ways, num_tracks
from tests.figures import MODELS, DenselyConnected, Repeated, boxes, chips, scene, scene_of
from tests.models import captured


@pytest.mark.parametrize("name", MODELS)
def test_no_two_boxes_and_no_two_weights_overlap(name: str) -> None:
    svg = draw(scene(name))
    weights, blocks = chips(svg), boxes(svg)
    for one, other in (*itertools.combinations(weights, 2), *itertools.combinations(blocks, 2)):
        assert not one.overlaps(other), (one, other)
    for weight in weights:
        assert sum(block.holds(weight) for block in blocks) == 1, weight


@pytest.mark.parametrize("name", MODELS)
def test_everything_is_on_the_page(name: str) -> None:
    svg = draw(scene(name))
    root = ElementTree.fromstring(svg)
    width, height = float(root.get("width", "")), float(root.get("height", ""))
    assert all(box.x >= 0 and box.x + box.width <= width and box.y + box.height <= height for box in boxes(svg))


@pytest.mark.parametrize("name", MODELS)
def test_edges_run_at_right_angles_and_cross_no_weight(name: str) -> None:
    shown = scene(name)
    sizes, columns = best_columns(shown.boxes, chip_width(shown), label_width(shown))
    routed = route(shown.model.graph, find_ports(columns, sizes), columns)
    paths = [points for found in routed.paths.values() for points in found]
    for points in paths:
        assert all(a[0] == b[0] or a[1] == b[1] for a, b in itertools.pairwise(points)), points
    svg = draw(shown)
    top, left = next(
        (float(y), float(x))
        for x, y in re.findall(r"translate\((\S+) (\S+)\)", svg)
        if f"({x} {y})" != "(24 24)" and x == "24"
    )
    for weight in chips(svg):
        low, high = (weight.x - left, weight.y - top), (weight.x - left + weight.width, weight.y - top + weight.height)
        assert not any(_crosses(points, low, high) for points in paths), weight


def _crosses(points: tuple[Point, ...], low: Point, high: Point) -> bool:
    return any(
        max(a[0], b[0]) > low[0] + 0.1
        and min(a[0], b[0]) < high[0] - 0.1
        and max(a[1], b[1]) > low[1] + 0.1
        and min(a[1], b[1]) < high[1] - 0.1
        for a, b in itertools.pairwise(points)
    )


def test_every_edge_of_the_graph_has_a_path() -> None:
    shown = scene("resnet-50")
    sizes, columns = best_columns(shown.boxes, chip_width(shown), label_width(shown))
    routed = route(shown.model.graph, find_ports(columns, sizes), columns)
    num_paths = {net: len(paths) for net, paths in routed.paths.items()}
    assert num_paths == {name: degree for name, degree in shown.model.graph.out_degree() if degree}


@pytest.mark.parametrize("name", ["resnet-101", "encoder-decoder"])
def test_a_large_model_fills_a_page_that_is_shaped_like_a_screen(name: str) -> None:
    root = ElementTree.fromstring(draw(scene(name)))
    width, height = float(root.get("width", "")), float(root.get("height", ""))
    assert 0.8 <= width / height <= 2.5
    assert width * height / len(chips(draw(scene(name)))) < 25_000, "pixels a weight"


def test_blocks_stand_in_execution_order() -> None:
    names = [box.name for box in scene("resnet-50").boxes]
    stages = [f"layer{stage + 1}.{block}" for stage, depth in enumerate((3, 4, 6, 3)) for block in range(depth)]
    assert names == ["", *stages, ""]


def test_a_branch_stands_beside_what_it_is_added_to() -> None:
    first = scene("resnet-50").boxes[1]
    names = [[item.fqn.removeprefix("layer1.0.") for item in cell.items] for cell in first.cells]
    assert names == [["conv1.weight"], ["conv2.weight"], ["conv3.weight", "downsample.0.weight"], [""]]


def test_a_block_that_runs_again_is_drawn_once_without_the_way_back() -> None:
    graph = figure_graph(captured(Repeated(), torch.randn(2, 8)))
    sites = {name: site_of(graph, name) for name in graph}
    assert [site.weights[0] for site in sites.values() if site.weights] == [
        "first.weight",
        "block.up.weight",
        "block.down.weight",
        "last.weight",
    ]
    assert {site.weights[0]: site.num_uses for site in sites.values() if site.weights}["block.up.weight"] == 4


def test_concatenations_of_all_before_become_a_chain() -> None:
    graph = figure_graph(captured(DenselyConnected(6), torch.randn(2, 4)))
    assert max(degree for _, degree in graph.in_degree()) == 2
    assert max(degree for _, degree in graph.out_degree()) == 2


def test_a_join_of_one_flow_with_itself_is_left_out() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            return self.b(x * torch.sigmoid(x) + x)

    graph = figure_graph(captured(Gated(), torch.randn(2, 4)))
    assert [site_of(graph, name).kind for name in graph] == ["weight", "weight"]


def test_a_loop_over_time_is_one_step() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state, found = self.a(x[:, 0]), list[torch.Tensor]()
            for step in self.b(x).unbind(1):
                state = 0.5 * state + step
                found.append(state.tanh())
            return self.c(torch.stack(found, 1))

    graph = figure_graph(captured(Loop(), torch.randn(2, 20, 4)))
    assert len(graph) == 4
    assert [graph.in_degree(name) for name in graph] == [0, 0, 2, 1]


def test_more_than_six_weights_side_by_side_are_a_grid_with_one_way_in_and_out() -> None:
    shown = scene("many-experts")
    box = shown.boxes[0]
    assert [len(cell.items) for cell in box.cells] == [1, 9, 9, 1]
    sizes, columns = best_columns(shown.boxes, chip_width(shown), label_width(shown))
    routed = route(shown.model.graph, find_ports(columns, sizes), columns)
    assert sum(len(paths) for net, paths in routed.paths.items() if ".experts." in net or "experts_" in net) <= 6


def test_lines_break_behind_joins() -> None:
    cells = tuple(Cell((Item((str(index),), fqn),)) for index, fqn in enumerate(["a", "b", "", "c", "d", ""]))
    assert [len(line.cells) for line in box_lines(0, Box("", cells), Sizes(100, 50, 3))] == [3, 3]
    assert [len(line.cells) for line in box_lines(0, Box("", cells), Sizes(100, 50, 4))] == [6]
    chain = tuple(Cell((Item((str(index),), "w"),)) for index in range(7))
    assert [len(line.cells) for line in box_lines(0, Box("", chain), Sizes(100, 50, 6))] == [4, 3]


def test_stretches_that_touch_take_tracks_of_their_own() -> None:
    ways = Ways()
    for net, start, stop in (("a", 0, 10), ("b", 5, 20), ("c", 30, 22), ("a", 12, 3)):
        ways.ask("rail", net, start, stop)
    tracks = ways.tracks()
    assert tracks["rail"] == {"a": 0, "b": 1, "c": 0}
    assert num_tracks(tracks, "rail") == 2
    assert num_tracks(tracks, "another") == 0


@pytest.mark.parametrize(
    ("path", "limit", "short"),
    [
        ("conv1", 8, "conv1"),
        ("attn.self.query", 12, "\u2026self.query"),
        ("multihead_attn.in_proj_weight", 24, "\u2026ead_attn.in_proj_weight"),
        ("transformer_blocks.0.attn1.to_q", 24, "\u20260.attn1.to_q"),
        ("attn.query", 9, "\u2026query"),
        ("a.relative_attention_bias", 12, "relat\u2026n_bias"),
        ("\u5c42" * 8, 7, "\u5c42\u2026\u5c42\u5c42"),
    ],
)
def test_long_names_keep_their_last_parts(path: str, limit: int, short: str) -> None:
    assert shorten(path, limit) == short
    assert num_places(short) <= limit


def test_names_of_weights_leave_out_their_box_and_weight() -> None:
    assert weight_name("layer1.0.conv1.weight", "layer1.0") == "conv1"
    assert weight_name("attn.in_proj_weight", "attn") == "in_proj_weight"
    assert weight_name("weight", "") == "weight"


def test_names_of_boxes_break_behind_dots() -> None:
    assert label_lines("layer1.0", 12, 2) == ["layer1.0"]
    assert label_lines("vision_model.encoder.layers.0", 17, 2) == ["vision_model.", "encoder.layers.0"]
    assert label_lines("a.vision_model.encoder.layers.0", 17, 2) == ["a.vision_model.", "encoder.layers.0"]
    assert label_lines("one_long.second_long.third_long", 12, 2) == ["\u2026econd_long.", "third_long"]
    assert label_lines("", 12, 2) == [""]


def test_paths_have_round_corners_and_arrows_point_along_them() -> None:
    points = ((0.0, 0.0), (10.0, 0.0), (10.0, 30.0))
    assert rounded(points) == "M0 0L6 0Q10 0 10 4L10 30"
    assert arrow(points) == "M10 30l-3 -5h6z"
    assert arrow(((0.0, 0.0), (8.0, 0.0))) == "M8 0l-5 -3v6z"


def test_a_long_chain_outside_of_blocks_is_parted_into_boxes_that_fit_into_columns() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(100)))
    found = scene_of(model, torch.randn(1, 2)).boxes
    assert [sum(len(cell.items) for cell in box.cells) for box in found] == [24, 24, 24, 24, 4]


def test_sums_of_parallel_branches_stay_apart() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.ModuleList(nn.Linear(4, 4) for _ in range(5)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [a(x) + b(x) for a, b in zip(self.a, self.b, strict=True)]

    graph = figure_graph(captured(Branches(), torch.randn(2, 4)))
    assert [graph.in_degree(name) for name in graph if site_of(graph, name).kind == "join"] == [2] * 5
