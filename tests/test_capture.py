"""The recording is what ran: outputs, gradients and buffers equal eager exactly, and the model is left as it was."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from gapfx.capture import Capture, capture, tensors_in


def values(model: nn.Module, call: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
    """Outputs, gradients and buffers of one seeded step of `call`, with the model put back afterwards."""
    start = {name: value.clone() for name, value in model.state_dict().items()}
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    outputs = [tensor for tensor in tensors_in(call(*args, **kwargs)) if tensor.is_floating_point()]
    torch.stack([output.float().pow(2).sum() for output in outputs]).sum().backward()
    gradients = [torch.tensor([]) if p.grad is None else p.grad.clone() for p in model.parameters()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    model.load_state_dict(start)
    return [output.detach() for output in outputs] + gradients + buffers


def check_equals_eager(model: nn.Module, *args: Any, **kwargs: Any) -> Capture:
    """Record in train mode, compare with eager exactly, return the capture."""
    model.train()
    recorded = capture(model, lambda module: module(*args, **kwargs))
    recorded.graph_module.graph.lint()
    eager = values(model, model, *args, **kwargs)
    replayed = values(model, recorded.graph_module, *tensors_in((args, kwargs)))
    assert len(eager) == len(replayed)
    for expected, got in zip(eager, replayed, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    return recorded


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.norm, self.act = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.b(self.act(self.a(x))))
        y += x
        return self.act(y)


def make_cnn() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), Residual(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


class LanguageModel(nn.Module):
    """Tied head, a submodule called `self`, dropout, keyword inputs, a dict out."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(20, width), nn.Parameter(torch.randn(6, width))
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(width, 2, 16, 0.1, batch_first=True) for _ in range(2))
        self.add_module("self", nn.Linear(width, width))
        self.head = nn.Linear(width, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, batch: dict[str, Tensor], *, scale: float = 1.0) -> dict[str, Any]:
        x = self.embed(batch["ids"]) + self.place[: batch["ids"].shape[1]]
        for layer in self.layers:
            x = layer(x) * scale
        x = self.get_submodule("self")(x)
        return {"logits": self.head(x), "hidden": [x, (x.mean(),)]}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, 2, dropout=0.2, bidirectional=True)
        self.attend = nn.MultiheadAttention(8, 2, kdim=6, vdim=6)

    def forward(self, x: Tensor, lengths: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        y, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0])
        return self.attend(y, memory, memory)


class Mixed(nn.Module):
    """In-place writes through views, no_grad, autocast, autograd.grad, vmap, numpy, a swallowed error."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        with torch.no_grad():
            y = 1 - self.a(x) ** 2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = self.b(x).float()
        with pytest.raises(RuntimeError):
            self.a(x[:, :2])
        y[:, 0].mul_(2)
        y[chosen] = 0
        leaf = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.a(leaf).sum(), leaf, create_graph=True)
        shift = float(np.sum(np.ones(3)))
        return y + z * slope + torch.vmap(lambda row: row * 2)(x) + shift


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_transformer_replays_bit_for_bit(dropout: float) -> None:
    model = nn.Transformer(8, 2, 2, 2, 16, dropout, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(3)
    recorded = check_equals_eager(model, torch.randn(2, 4, 8), torch.randn(2, 3, 8), tgt_mask=mask)
    matrices = {fqn for fqn, p in recorded.parameters.items() if len(p.shape) == 2}
    assert {fqn for fqn, p in recorded.parameters.items() if p.role == "gemm"} == matrices


def test_cnn_with_batch_norm_and_writes_in_place_replays_bit_for_bit() -> None:
    recorded = check_equals_eager(make_cnn(), torch.randn(2, 3, 8, 8))
    add = next(node for node in recorded.graph_module.graph.nodes if node.meta.get("fn") == "add_")
    assert add.meta["stack"] == (("", 1), ("1", 1))
    assert add.meta["shape"] == (2, 4, 6, 6)


def test_mlp_replays_bit_for_bit() -> None:
    check_equals_eager(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 2)), torch.randn(3, 4))


def test_dicts_keywords_and_structures_replay_bit_for_bit() -> None:
    batch = {"ids": torch.randint(0, 20, (2, 5)), "text": "ignored"}
    recorded = check_equals_eager(LanguageModel(), batch, scale=0.5)
    placeholders = [node.name for node in recorded.graph_module.graph.nodes if node.op == "placeholder"]
    assert placeholders == ["batch_ids"]


def test_packed_lstm_and_attention_replay_bit_for_bit() -> None:
    inputs = torch.randn(3, 2, 3), torch.tensor([3, 2]), torch.randn(5, 2, 6)
    recorded = check_equals_eager(Recurrent(), *inputs)
    assert {use.fn for use in recorded.uses} == {"lstm", "multi_head_attention"}
    assert all(use.node in {"lstm", "attend"} and use.user == use.node for use in recorded.uses)


def test_modes_writes_and_transforms_replay_bit_for_bit() -> None:
    recorded = check_equals_eager(Mixed(), torch.randn(2, 4), torch.tensor([[True] * 4, [False] * 4]))
    writer = next(node for node in recorded.graph_module.graph.nodes if node.meta.get("fn") == "setitem")
    assert writer.meta["mem_deps"] == ("mul_",)


def test_a_module_called_twice_has_two_nodes_and_two_uses() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x))

    recorded = check_equals_eager(Twice(), torch.randn(2, 4))
    uses = [use for use in recorded.uses if use.fqn == "block.0.weight"]
    assert [use.node for use in uses] == ["block_0", "block_0_call2"]
    nodes = {node.name: node for node in recorded.graph_module.graph.nodes}
    assert nodes["block_0_call2"].meta["stack"] == (("", 1), ("block", 2), ("block.0", 2))


def test_names_that_a_graph_module_has_itself_are_kept_as_fqns() -> None:
    class Names(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.code, self.graph = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.code(x) @ self.graph

    recorded = check_equals_eager(Names(), torch.randn(2, 4))
    assert [(use.fqn, use.role) for use in recorded.uses if use.role == "gemm"] == [
        ("code.weight", "gemm"),
        ("graph", "gemm"),
    ]


def test_a_dataclass_goes_in_and_out() -> None:
    @dataclass
    class Pair:
        x: Tensor
        label: str = "one"

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, pair: Pair) -> Pair:
            return Pair(self.linear(pair.x))

    recorded = check_equals_eager(Model(), Pair(torch.randn(2, 4)))
    assert [node.op for node in recorded.graph_module.graph.nodes] == ["placeholder", "call_module", "output"]


def test_recording_ends_when_the_root_returns() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)

    def loss(module: nn.Module) -> Tensor:
        def closure() -> Tensor:
            return F.mse_loss(module(x * 2), x) + module(x).sum()

        return closure()

    recorded = capture(model, loss)
    assert [node.op for node in recorded.graph_module.graph.nodes] == ["placeholder", "call_module", "output"]
    assert recorded.notes == ("the model: called 2 times by the loss, only the first call was recorded",)


class Stateful(nn.Module):
    """Changes everything that a forward can change."""

    count: Tensor

    def __init__(self, *, fails: bool) -> None:
        super().__init__()
        self.norm, self.fails, self.calls = nn.BatchNorm1d(4), fails, 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count = self.count + 1
        self.register_buffer("cache", x)
        y = F.dropout(self.norm(x)) * random.random() * float(np.random.rand())
        if self.fails:
            raise ValueError("on purpose")
        return y


@pytest.mark.parametrize("fails", [False, True])
def test_random_state_buffers_attributes_and_patches_are_put_back(fails: bool) -> None:
    model = Stateful(fails=fails)
    count, mean = model.count, cast(Tensor, model.norm.running_mean)
    np.random.seed(0)
    rng, python_rng, numpy_rng = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)
    watched = nn.Module.__call__, Function.__dict__["apply"], torch.autocast.__enter__, torch.autocast.__exit__
    try:
        capture(model, lambda module: module(torch.ones(2, 4)))
    except Exception:
        assert fails
    assert (nn.Module.__call__, Function.__dict__["apply"]) == watched[:2]
    assert (torch.autocast.__enter__, torch.autocast.__exit__) == watched[2:]
    assert torch.equal(rng, torch.get_rng_state())
    assert python_rng == random.getstate()
    assert str(numpy_rng) == str(np.random.get_state(legacy=False))
    assert model.count is count
    assert model.norm.running_mean is mean
    assert float(count) == 0
    assert not mean.any()
    assert model.calls == 0
    assert sorted(name for name, _ in model.named_buffers()) == [
        "count",
        "norm.num_batches_tracked",
        "norm.running_mean",
        "norm.running_var",
    ]


def test_recording_twice_gives_the_same_graph() -> None:
    model, x = make_cnn(), torch.randn(2, 3, 8, 8)
    first, second = (capture(model, lambda module: module(x)) for _ in range(2))
    assert first.graph_module.code == second.graph_module.code
    assert first.uses == second.uses
    assert first.parameters == second.parameters


def test_a_compiled_model_is_recorded_op_by_op() -> None:
    model = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    recorded = capture(cast(nn.Module, model), lambda module: module(torch.randn(2, 4)))
    assert recorded.parameters["_orig_mod.0.weight"].role == "gemm"


def test_a_model_on_the_meta_device_is_recorded_from_meta_inputs_and_noted() -> None:
    model = nn.Sequential(nn.Linear(4, 4, device="meta"))
    recorded = capture(model, lambda module: module(torch.randn(2, 4, device="meta")))
    assert recorded.parameters["0.weight"].role == "gemm"
    assert recorded.notes == ("the model: parameters are on the meta device, only shapes were recorded",)
