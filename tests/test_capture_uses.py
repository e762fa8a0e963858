"""Roles of parameters: which reads are operands of a product, through which views and scalings."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import gapfx.ops  # noqa: F401  # pyright: ignore[reportUnusedImport]
from gapfx.capture import Capture, capture


class Reads(nn.Module):
    """A model whose forward reads `w` [4, 4] through a function."""

    def __init__(self, read: Callable[[Tensor, Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.w, self.read, self.linear = nn.Parameter(torch.rand(4, 4) + 1), read, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x, self.w, self)


IDS = torch.tensor([0, 2])
ROLES: dict[str, tuple[Callable[[Tensor, Tensor, Any], Tensor], str, str]] = {
    "linear": (lambda x, w, m: F.linear(x, w), "gemm", "linear"),
    "operand of matmul": (lambda x, w, m: x @ w, "gemm", "matmul"),
    "reflected matmul": (lambda x, w, m: w @ x.T, "gemm", "matmul"),
    "transposed attribute": (lambda x, w, m: x @ w.T.data, "gemm", "matmul"),
    "einsum": (lambda x, w, m: torch.einsum("bi,oi->bo", x, w), "gemm", "einsum"),
    "convolution through views": (
        lambda x, w, m: F.conv1d(x[..., None], w.t().contiguous()[..., None]),
        "gemm",
        "conv1d",
    ),
    "one of several chunks": (lambda x, w, m: x @ w.chunk(2, 1)[1], "gemm", "matmul"),
    "joined with a constant": (lambda x, w, m: x @ torch.cat([w, torch.zeros(4, 1)], 1), "gemm", "matmul"),
    "times a mask": (lambda x, w, m: x @ (w * torch.ones(4, 4).tril()), "gemm", "matmul"),
    "over its norm": (lambda x, w, m: x @ (w / w.norm()), "gemm", "norm"),
    "rows of a kernel by an index": (lambda x, w, m: F.conv1d(x[..., None], w[IDS][..., None]), "gemm", "conv1d"),
    "rows for a linear": (lambda x, w, m: F.linear(x, w[IDS]), "gemm", "linear"),
    "rows in another order": (lambda x, w, m: x @ w[torch.tensor([1, 0, 3, 2])], "gemm", "matmul"),
    "second operand of addmm": (lambda x, w, m: torch.addmm(x, x, w), "gemm", "addmm"),
    "operand of bmm by chunks": (
        lambda x, w, m: torch.bmm(x[None], torch.stack(w.split([2, 2]), 0).reshape(1, 4, 4)),
        "gemm",
        "bmm",
    ),
    "operand of baddbmm": (lambda x, w, m: torch.baddbmm(x[None], x[None], w[None]), "gemm", "baddbmm"),
    "summand of baddbmm": (lambda x, w, m: torch.baddbmm(w[None], x.T[None], x[None]), "other", "baddbmm"),
    "tensordot": (lambda x, w, m: torch.tensordot(x, w, 1), "gemm", "tensordot"),
    "unbound and stacked": (lambda x, w, m: x @ torch.stack(w.unbind(0)[::-1]), "gemm", "matmul"),
    "rows by an index tensor": (lambda x, w, m: x @ w.index_select(0, torch.tensor([1, 0, 2, 3])), "gemm", "matmul"),
    "cast and back": (lambda x, w, m: x @ w.double().to(torch.float32).type_as(x), "gemm", "matmul"),
    "transposed convolution": (
        lambda x, w, m: F.conv_transpose2d(x[:, :, None, None], w[:, :, None, None]),
        "gemm",
        "conv_transpose2d",
    ),
    "grouped product": (
        lambda x, w, m: torch.nn.functional.grouped_mm(
            x.repeat(8, 4).bfloat16(),
            w.repeat(4, 4)[None].bfloat16()[[0, 0]],
            offs=torch.tensor([8, 16], dtype=torch.int32),
        ),
        "gemm",
        "_grouped_mm",
    ),
    "rounded straight through": (lambda x, w, m: x @ (w + ((w * 4).round() / 4 - w).detach()), "gemm", "matmul"),
    "clamped around zero": (lambda x, w, m: x @ w.clamp(-1, 1), "gemm", "matmul"),
    "clamped above zero": (lambda x, w, m: x @ w.clamp(1, 2), "other", "clamp"),
    "plus its transpose": (lambda x, w, m: x @ (w + w.t()), "other", "add"),
    "scaled by the input, then a weight": (
        lambda x, w, m: F.linear(x, (w[:, None] * x[:1]).flatten(1)),
        "gemm",
        "mul",
    ),
    "scaled by the input, then an activation": (lambda x, w, m: F.linear(w[:2] * x, m.linear.weight), "other", "mul"),
    "summand of addmm": (lambda x, w, m: torch.addmm(w[:2], x, m.linear.weight), "other", "addmm"),
    "bias of linear": (lambda x, w, m: F.linear(x, m.linear.weight, w.mean(0)), "other", "mean"),
    "activation of linear": (lambda x, w, m: F.linear(w, m.linear.weight), "other", "linear"),
    "input of a module": (lambda x, w, m: m.linear(w) + x.sum(), "other", "linear"),
    "a scale": (lambda x, w, m: x * w[0], "other", "mul"),
    "a divisor": (lambda x, w, m: x @ (1 / w), "other", "div"),
    "a position table": (lambda x, w, m: x + w[IDS], "other", "add"),
    "joined with an activation": (lambda x, w, m: torch.cat([x, w]) @ m.linear.weight, "other", "cat"),
    "an exponent that multiplies": (lambda x, w, m: x * w.exp()[0], "other", "exp"),
    "its mean subtracted": (lambda x, w, m: x @ (w - w.mean()), "other", "mean"),
    "standardised by rows": (
        lambda x, w, m: F.linear(x, (w - torch.var_mean(w, 1, keepdim=True)[1]) / 2),
        "other",
        "var_mean",
    ),
    "standardised by a norm": (
        lambda x, w, m: F.linear(x, F.batch_norm(w[None], None, None, training=True)[0]),
        "other",
        "batch_norm",
    ),
    "the gain of a standardised weight": (
        lambda x, w, m: F.linear(x, F.batch_norm(m.linear.weight[None], None, None, w[0], training=True)[0]),
        "other",
        "batch_norm",
    ),
    "a lookup": (lambda x, w, m: F.embedding(IDS, w) + x, "embedding", "embedding"),
    "a lookup and a product": (lambda x, w, m: F.embedding(IDS, w) @ w, "gemm", "embedding"),
    "rows chosen by the input": (lambda x, w, m: x @ w[x.argmax(1)].T, "embedding", "getitem"),
    "rows of relative positions": (
        lambda x, w, m: torch.einsum("bd,ijd->bij", x, w[IDS[:, None] - IDS]),
        "embedding",
        "getitem",
    ),
    "rows by index_select": (lambda x, w, m: x @ w.index_select(0, IDS).T, "embedding", "index_select"),
    "elements by gather": (lambda x, w, m: x[:, :2] @ w.gather(0, IDS[:, None]), "embedding", "gather"),
    "rows of a table's view": (lambda x, w, m: x @ w.view(2, 2, 4)[0, IDS // 2].T, "embedding", "getitem"),
    "matrices by fixed positions": (lambda x, w, m: x @ w.view(2, 2, 4)[torch.arange(1)].mT, "embedding", "getitem"),
    "matrices chosen by the input": (lambda x, w, m: x @ w.view(2, 2, 4)[x.argmax(1)[:1] % 2].mT, "gemm", "matmul"),
    "a template for a shape": (lambda x, w, m: m.linear.weight.view_as(w) @ x.T, "unused", ""),
    "a template for zeros": (lambda x, w, m: x @ torch.zeros_like(w), "unused", ""),
    "returned": (lambda x, w, m: w, "other", "output"),
    "not read": (lambda x, w, m: x, "unused", ""),
    "only its dtype": (lambda x, w, m: x.to(w.dtype), "unused", ""),
}


def recorded(model: nn.Module, *inputs: Tensor) -> Capture:
    return capture(model, lambda module: module(*inputs))


STANDARDISED = (
    ": its zeros do not stay zeros, and zeros made after that would not be in the state_dict;"
    " to make it sparse, put the standardised weight into a plain layer first"
)
REASONS = {
    "summand of addmm": "the bias of addmm",
    "bias of linear": "the bias of linear, after mean",
    "activation of linear": "an activation of linear: a token or a query, no weight",
    "input of a module": "an input of the module linear (linear): a token or a query, no weight",
    "a scale": "multiplied with activations element by element by mul: a scale",
    "a divisor": "reaches matmul through div, where its zeros do not stay zeros",
    "a position table": "added to activations by add: a position table or a bias",
    "joined with an activation": "joined with activations by cat: a token or a table",
    "an exponent that multiplies": "multiplied with activations element by element by mul: a scale, after exp",
    "its mean subtracted": f"standardised by sub before matmul{STANDARDISED}",
    "standardised by rows": f"standardised by sub before linear{STANDARDISED}",
    "the gain of a standardised weight": "the scale or bias of batch_norm",
    "standardised by a norm": f"standardised by batch_norm before linear{STANDARDISED}",
    "plus its transpose": "reaches matmul through add, where its zeros do not stay zeros",
    "clamped above zero": "reaches matmul through clamp, where its zeros do not stay zeros",
    "returned": "returned by the model as it is: an output, no weight",
}


@pytest.mark.parametrize("case", REASONS)
def test_what_is_no_weight_has_a_reason_of_its_own(case: str) -> None:
    found = recorded(Reads(ROLES[case][0]), torch.randn(2, 4))
    assert [use.reason for use in found.uses if use.fqn == "w"][-1] == REASONS[case]


@pytest.mark.parametrize("case", ROLES)
def test_role_of_a_read(case: str) -> None:
    read, role, first_fn = ROLES[case]
    found = recorded(Reads(read), torch.randn(2, 4))
    assert found.parameters["w"].role == role
    assert next((use.fn for use in found.uses if use.fqn == "w"), "") == first_fn


def test_tied_weights_have_one_canonical_name_and_the_higher_role() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False))
    model.get_submodule("1").weight = model.get_submodule("0").weight
    found = recorded(model, torch.tensor([1, 2]))
    assert list(found.parameters) == ["0.weight"]
    tied = found.parameters["0.weight"]
    assert (tied.owner, tied.aliases, tied.role, tied.shape) == ("0", ("1.weight",), "gemm", (9, 4))
    assert [(use.user, use.fn, use.role) for use in found.uses] == [
        ("0", "embedding", "embedding"),
        ("1", "linear", "gemm"),
    ]


def test_a_weight_read_outside_its_owner_names_the_reader() -> None:
    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.owner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.owner.weight)

    (use,) = recorded(nn.Sequential(Foreign()), torch.randn(2, 4)).uses
    assert (use.fqn, use.user, use.node, use.role) == ("0.owner.weight", "0", "linear", "gemm")


def test_reads_inside_leaves_are_uses_of_the_leaf() -> None:
    found = recorded(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), torch.randn(2, 3, 4))
    out_proj = next(use for use in found.uses if use.fqn == "self_attn.out_proj.weight")
    assert (out_proj.user, out_proj.fn, out_proj.role) == ("self_attn", "multi_head_attention", "gemm")
    assert found.parameters["self_attn.out_proj.weight"].owner == "self_attn.out_proj"
    assert [use.fn for use in found.uses if use.fqn.startswith("norm1")] == ["layer_norm"] * 2
    assert {p.role for p in found.parameters.values() if len(p.shape) < 2} == {"other"}


def test_the_fast_path_of_eval_reads_the_same_weights() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    with torch.no_grad():
        found = recorded(layer, torch.randn(2, 3, 4))
    assert {fqn for fqn, p in found.parameters.items() if p.role == "gemm"} == {
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
    }


def test_reparametrised_weights_are_gemm_where_their_zeros_survive() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = nn.utils.weight_norm(nn.Linear(4, 4))
    model = nn.Sequential(weight_norm(nn.Linear(4, 4)), spectral_norm(nn.Linear(4, 4)), old)
    found = recorded(model, torch.randn(2, 4))
    assert {fqn: p.role for fqn, p in found.parameters.items() if len(p.shape) > 1} == {
        "0.parametrizations.weight.original0": "other",
        "0.parametrizations.weight.original1": "gemm",
        "1.parametrizations.weight.original": "gemm",
        "2.weight_g": "other",
        "2.weight_v": "gemm",
    }


def test_a_leaf_with_a_hook_or_its_own_forward_is_recorded_op_by_op() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, self.weight - self.weight.mean(), self.bias)

    hooked, extra = nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.Sequential(Scaled(4, 4), hooked)
    hooked.adapter = extra
    hooked.register_forward_hook(lambda module, args, out: out + extra(args[0]))
    found = recorded(model, torch.randn(2, 4))
    assert {fqn: p.role for fqn, p in found.parameters.items() if len(p.shape) > 1} == {
        "0.weight": "other",
        "1.weight": "gemm",
        "1.adapter.weight": "gemm",
    }


def test_uses_come_in_execution_order() -> None:
    found = recorded(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)), torch.randn(2, 4))
    order = {node.name: index for index, node in enumerate(found.graph_module.graph.nodes)}
    places = [order[use.node] for use in found.uses]
    assert places == sorted(places)
    assert len(places) == 6


def test_generated_forwards_and_masked_weights_are_recorded() -> None:
    graph = fx.Tracer().trace(nn.Linear(4, 4))
    weight = next(node for node in graph.nodes if node.target == "weight")
    with graph.inserting_after(weight):
        bits = graph.get_attr("bits")
    with graph.inserting_after(bits):
        masked = graph.call_function(torch.ops.gapfx.mask.default, (weight, bits))
    weight.replace_all_uses_with(masked, delete_user_cb=lambda user: user is not masked)
    linear = nn.Linear(4, 4)
    linear.register_buffer("bits", torch.full((2,), 255, dtype=torch.uint8))
    found = recorded(nn.Sequential(fx.GraphModule(linear, graph)), torch.randn(2, 4))
    assert [(use.fqn, use.fn, use.role) for use in found.uses if use.fqn == "0.weight"] == [
        ("0.weight", "linear", "gemm")
    ]
