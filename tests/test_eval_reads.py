"""Reads of weights by other modules in the forward of eval."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as modules

import gapfx
from gapfx.capture import EvalReads, eval_reads
from gapfx.masks import stored_parameter
from tests.models import LanguageModel, TiedPair, tokens


class EvalReader(nn.Module):
    """Runs its child in train; in eval it multiplies with the child's weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.norm(self.inner(x) if self.training else F.linear(F.dropout(x), self.inner.weight.t()))


class TrainOnly(nn.Module):
    """Does not run in eval."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            raise RuntimeError("no eval here\nreally")
        return self.inner(x)


def test_a_weight_that_a_parent_reads_in_eval_is_named_with_its_reader() -> None:
    model, x = nn.Sequential(EvalReader()), torch.randn(3, 4)
    assert eval_reads(model, lambda m: m(x)) == EvalReads({"0.inner.weight": "0"})


def test_weights_in_their_own_modules_are_no_foreign_reads_also_when_tied() -> None:
    assert eval_reads(TiedPair(), lambda m: m(torch.randn(3, 6))) == EvalReads()
    assert eval_reads(LanguageModel(), lambda m: m(tokens())) == EvalReads()


def test_the_fast_path_of_torch_is_seen() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    found = eval_reads(model, lambda m: m(torch.randn(2, 5, 8))).foreign
    assert found["layers.1.linear1.weight"] == "layers.1"
    assert found["layers.0.self_attn.in_proj_weight"] == "layers.0"


def test_the_model_is_left_as_it_was() -> None:
    model, x = nn.Sequential(EvalReader(), nn.Dropout()).train(), torch.randn(3, 4)
    model[1].eval()
    state, before = torch.get_rng_state(), {key: value.clone() for key, value in model.state_dict().items()}
    hooks = len(vars(modules)["_global_forward_hooks"])
    eval_reads(model, lambda m: m(x))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model] == [True, False]
    assert (vars(model[0])["calls"], len(vars(modules)["_global_forward_hooks"])) == (0, hooks)


def test_a_model_that_does_not_run_in_eval_compiles_with_a_note() -> None:
    assert eval_reads(TrainOnly(), lambda m: m(torch.randn(3, 4))) == EvalReads(failure="RuntimeError: no eval here")
    sparse = gapfx.sparsify(TrainOnly(), (torch.randn(3, 4),), sparsity=0.5)
    assert sparse.notes == (
        "the model: its forward in eval fails (RuntimeError: no eval here), "
        "so weights that other modules read in eval alone are not known",
    )
    assert sparse.module.training


def test_a_weight_read_in_eval_alone_is_masked_in_both_modes() -> None:
    model, x = nn.Sequential(EvalReader()), torch.randn(3, 4)
    sparse = gapfx.sparsify(model, (x,), sparsity=0.5)
    with torch.no_grad():
        stored_parameter(model, "0.inner.weight").fill_(1)
    mask = sparse.masks["0.inner.weight"].float()
    assert torch.equal(model[0].get_submodule("inner")(x), x @ mask.T)
    assert torch.equal(vars(model[0])["_modules"]["inner"].weight, mask)
