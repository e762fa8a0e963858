"""The graph of layers."""

from __future__ import annotations

import warnings
from typing import cast

import networkx as nx
import torch
from torch import nn

from gapfx.layers import Layer, execution_order, in_series, layer_graph, layer_of
from tests.models import Attention, Experts, LanguageModel, TiedPair, captured, mlp, resnet50, resnet_input, tokens


def layers_of(graph: nx.DiGraph[str]) -> list[Layer]:
    return [cast(Layer, layer) for _, layer in graph.nodes(data="layer")]


def test_resnet50_has_a_node_for_each_weight_and_each_residual_sum() -> None:
    graph = layer_graph(captured(resnet50(), resnet_input()))
    kinds = [layer.kind for layer in layers_of(graph)]
    assert (kinds.count("weight"), kinds.count("join"), graph.number_of_edges()) == (54, 16, 85)
    assert nx.is_directed_acyclic_graph(graph)
    assert nx.is_weakly_connected(graph)


def test_nodes_come_in_execution_order_with_weights_function_and_scope() -> None:
    graph = layer_graph(captured(mlp(), torch.randn(2, 6)))
    layers = layers_of(graph)
    assert [(layer.fn, layer.weights, layer.scope) for layer in layers] == [
        ("linear", ("0.weight",), "0"),
        ("linear", ("2.weight",), "2"),
        ("linear", ("4.weight",), "4"),
    ]
    names = list(graph)
    assert list(graph.edges) == [(names[0], names[1]), (names[1], names[2])]


def test_a_tied_weight_is_a_node_at_each_place_where_it_is_used() -> None:
    graph = layer_graph(captured(TiedPair(), torch.randn(2, 6)))
    assert [layer.weights for layer in layers_of(graph)] == [("first.weight",)] * 2


def test_execution_order_is_that_of_the_first_use_not_of_the_definition() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(self.last(self.first(x)))

    assert execution_order(captured(Reversed(), torch.randn(2, 4))) == ("first.weight", "last.weight")


def test_execution_order_has_embeddings_and_leaves_out_what_is_added() -> None:
    order = execution_order(captured(LanguageModel(is_tied=False), tokens()))
    assert (order[0], order[-1], "positions" in order) == ("tokens.weight", "head.weight", False)


def test_the_weights_of_one_attention_are_one_layer() -> None:
    capture = captured(Attention(), torch.randn(2, 5, 8), torch.randn(2, 4, 6))
    layers = {fqn: layer_of(capture, fqn) for fqn in execution_order(capture)}
    assert set(layers.values()) == {"attention", "cross"}
    assert layers["attention.out_proj.weight"] == "attention"
    assert layers["cross.q_proj_weight"] == "cross"


def test_weights_in_a_script_module_are_layers_of_their_owners() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        script = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    capture = captured(nn.Sequential(script, nn.Linear(4, 4)), torch.randn(2, 4))
    assert [layer_of(capture, fqn) for fqn in execution_order(capture)] == ["0.0", "1"]


def test_experts_do_not_run_in_series_and_the_layers_that_hold_them_do() -> None:
    model = nn.Sequential(Experts(), Experts())
    capture = captured(model, torch.randn(10, 8))
    graph = layer_graph(capture)

    def sites(prefix: str) -> set[str]:
        return {use.node for use in capture.uses if use.fqn.startswith(prefix) and use.role == "gemm"}

    assert not in_series(graph, sites("0.experts.0"), sites("0.experts.1"))
    assert in_series(graph, sites("0.experts.0"), sites("1.experts.1"))
    assert not in_series(graph, sites("1.experts.0"), sites("0.experts.1"))
