"""Graphs of which code is generated only when it is needed."""

from __future__ import annotations

import copy

import torch
from torch import fx, nn

from gapfx.capture.late_code import LateGraphModule


def made(name: str = "Made") -> LateGraphModule:
    return LateGraphModule(nn.Module(), fx.Tracer().trace(nn.ReLU()), name)


def test_instances_share_one_class_until_code_is_needed() -> None:
    first, second = made("First"), made("Second")
    assert type(first) is type(second) is LateGraphModule
    assert first(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]
    assert type(first).__name__ == "First"
    assert type(second) is LateGraphModule
    assert LateGraphModule.__name__ == "LateGraphModule"


def test_an_edited_graph_runs_as_edited_after_recompile() -> None:
    module = made()
    assert "relu" in module.code
    [node] = module.graph.find_nodes(op="call_function", target=torch.nn.functional.relu)
    node.target = torch.neg
    node.kwargs = {}
    module.recompile()
    assert module(torch.ones(2)).tolist() == [-1.0, -1.0]
    assert "neg" in module.code


def test_a_deep_copy_runs_on_its_own() -> None:
    module = made("Kept")
    twin = copy.deepcopy(module)
    [node] = module.graph.find_nodes(op="call_function", target=torch.nn.functional.relu)
    node.target, node.kwargs = torch.neg, {}
    module.recompile()
    assert module(torch.ones(2)).tolist() == [-1.0, -1.0]
    assert twin(torch.ones(2)).tolist() == [1.0, 1.0]
    assert type(twin).__name__ == "Kept"


def test_an_instance_has_what_torch_gives_every_graph_module() -> None:
    linear = nn.Linear(2, 3).eval()
    graph = fx.Tracer().trace(linear)
    late, usual = LateGraphModule(linear, graph, "Made"), fx.GraphModule(linear, graph, "Made")
    generated = {"_code", "_lineno_map", "_prologue_start"}
    assert set(vars(late)) == set(vars(usual)) - generated | {"_class_name"}
    assert dict(late.named_parameters()) == dict(linear.named_parameters())
    assert not late.training
    x = torch.randn(4, 2)
    assert torch.equal(late(x), linear(x))
    late.meta["kept"] = True
    assert not LateGraphModule(linear, graph).meta
