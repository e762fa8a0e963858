"""torch_geometric: small graph networks, one for each convolution or model."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from tools.zoo_cases.cases import Case, Inputs
from tools.zoo_cases.torchvision_ops import install

install()
gnn: Any = importlib.import_module("torch_geometric.nn")

CHANNELS = 16
NODES = 12
EDGES = 40
# Convolutions that take (in, out), with their further options.
CONVS: dict[str, dict[str, Any]] = {
    "GCNConv": {},
    "GATConv": {"heads": 2, "concat": False},
    "GATv2Conv": {"heads": 2, "concat": False},
    "SAGEConv": {},
    "GraphConv": {},
    "TransformerConv": {"heads": 2, "concat": False},
    "TAGConv": {},
    "ChebConv": {"K": 2},
    "ARMAConv": {"num_stacks": 2, "num_layers": 2},
    "SGConv": {"K": 2},
    "LEConv": {},
    "ClusterGCNConv": {},
    "GeneralConv": {},
    "MFConv": {},
    "FiLMConv": {},
    "SuperGATConv": {"heads": 2, "concat": False},
    "ResGatedGraphConv": {},
    "EGConv": {"num_heads": 2, "num_bases": 2},
    "FeaStConv": {"heads": 2},
}
# Whole models that take (in, hidden, layers, out).
MODELS = ("GCN", "GraphSAGE", "GIN", "GAT", "PNA", "EdgeCNN")
SAMPLE = ("GCNConv", "GATv2Conv", "SAGEConv", "TransformerConv", "ChebConv", "FiLMConv", "GIN", "PNA")


class TwoLayers(nn.Module):
    """Two convolutions of one kind and a readout."""

    def __init__(self, name: str) -> None:
        super().__init__()
        make = getattr(gnn, name)
        self.first = make(CHANNELS, CHANNELS, **CONVS[name])
        self.second = make(CHANNELS, CHANNELS, **CONVS[name])
        self.out = nn.Linear(CHANNELS, 4)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        """Class scores of each node."""
        x = torch.relu(self.first(x, edge_index))
        return self.out(torch.relu(self.second(x, edge_index)))


def cases() -> list[Case]:
    """Convolutions first."""
    convs = [_case(name, partial(TwoLayers, name)) for name in CONVS]
    return convs + [_case(name, partial(_model, name)) for name in MODELS]


def _case(name: str, build: Callable[[], nn.Module]) -> Case:
    return Case("torch_geometric", name, name, build, _graphs, kind="graph network")


def _model(name: str) -> nn.Module:
    degrees = {"aggregators": ["mean", "max"], "scalers": ["identity"], "deg": torch.ones(8)} if name == "PNA" else {}
    return getattr(gnn, name)(CHANNELS, CHANNELS, 2, 4, **degrees)


def _graphs(size: int) -> Inputs:
    """`size` graphs in one: their nodes behind each other."""
    edges = [torch.randint(0, NODES, (2, EDGES)) + NODES * graph for graph in range(size)]
    return Inputs((torch.randn(size * NODES, CHANNELS), torch.cat(edges, 1)))
