"""Graphs as rows of plain data."""

from __future__ import annotations

import pickle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import gapfx.ops  # noqa: F401  # pyright: ignore[reportUnusedImport]
from gapfx.rows import At, graph_of, identity, rows_of
from gapfx.text import format_graph


def traced(function: Any) -> fx.Graph:
    return fx.symbolic_trace(function).graph


def varied(x: Tensor, scale: float = 2.0) -> Any:
    masked = torch.ops.gapfx.mask.default(x, torch.ops.aten.view(x, [-1]))
    return {"a": [F.pad(masked, (1, 1), value=scale), x[1:, ..., None]], "b": masked.to(torch.float64, copy=True)}


def test_a_graph_comes_back_from_its_rows_also_through_pickle() -> None:
    graph = traced(varied)
    rows = pickle.loads(pickle.dumps(rows_of(graph)))
    back = graph_of(rows)
    back.lint()
    assert format_graph(fx.GraphModule(nn.Module(), back)) == format_graph(fx.GraphModule(nn.Module(), graph))
    assert identity(rows_of(back)) == identity(rows_of(graph))


def test_an_argument_is_the_place_of_the_row_that_makes_it() -> None:
    rows = rows_of(traced(lambda x: torch.relu(x)))  # pyright: ignore[reportUnknownLambdaType]
    assert [(row.op, row.args) for row in rows] == [
        ("placeholder", ()),
        ("call_function", (At(0),)),
        ("output", (At(1),)),
    ]


def add_one(x: Tensor) -> Tensor:
    return torch.add(x, 1)


def add_two(x: Tensor) -> Tensor:
    return torch.add(x, 2)


def subtract_one(x: Tensor) -> Tensor:
    return torch.sub(x, 1)


def test_graphs_of_other_functions_or_other_arguments_are_others() -> None:
    texts = {identity(rows_of(traced(function))) for function in (add_one, add_two, subtract_one, add_one)}
    assert len(texts) == 3
