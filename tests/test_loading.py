"""`gapfx.load`: a run as a model for inference against the plain model with the run's file in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import gapfx
from gapfx import loading, two_of_four
from gapfx.errors import UserError
from gapfx.kernels import native
from gapfx.loading import load_dense, load_run
from gapfx.task import load_task
from tests import runs
from tests.kernels.needs import excuse, needs_kernels

BATCHES = (0, 1, 3, 8, 64, 512)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short training of the task that classifies."""
    out = tmp_path_factory.mktemp("loading") / "run"
    assert runs.gapfx("sparsify", runs.TASK, "--out", out, "--rounds", 1, "--phase-epochs", 0.25) == 0
    return out


def plain(run: Path) -> nn.Module:
    """The dense model with the run's file in it."""
    model = load_task(runs.TASK).model()
    model.load_state_dict(load_file(run / "model.safetensors"))
    return model.eval()


def a_run_of(folder: Path, model: nn.Module, args: Sequence[Any], **options: Any) -> Path:
    """What a run of a model leaves, without the training."""
    sparse = gapfx.sparsify(model, args, **options)
    folder.mkdir()
    (folder / "plan.json").write_text(sparse.plan.to_json())
    for name in ("config.json", "summary.json"):
        (folder / name).write_text("{}")
    save_file(sparse.dense_state_dict(), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_run_equals_the_dense_model_with_its_file(run: Path, dtype: torch.dtype) -> None:
    loaded, wanted = gapfx.load(run).to(dtype), plain(run).to(dtype).double()
    tolerance = 1e-5 if dtype == torch.float32 else 0.08
    for batch in BATCHES:
        x = torch.randn(batch, 8).to(dtype)
        torch.testing.assert_close(loaded(x).double(), wanted(x.double()), rtol=0, atol=tolerance)


def test_a_sparse_file_loads_as_its_run_does(run: Path) -> None:
    x = torch.randn(5, 8)
    loaded = load_run(run / "model.gapfx", model=load_task(runs.TASK).model(), args=(x,))
    assert torch.equal(loaded.module(x), gapfx.load(run)(x))
    assert {weight.fqn for weight in loaded.weights} == {weight.fqn for weight in load_run(run).plan.weights()}
    with pytest.raises(UserError, match="a sparse file does not say how its model is built"):
        gapfx.load(run / "model.gapfx")
    with pytest.raises(UserError, match="of another model"):
        gapfx.load(run / "model.gapfx", model=nn.Linear(8, 4), args=(x,))


def test_the_dense_model_of_a_run_comes_with_what_runs_it(run: Path) -> None:
    model, batch_run = load_dense(run)
    assert isinstance(batch_run(model), Tensor)
    x = torch.randn(3, 8)
    assert torch.equal(model(x), plain(run)(x))
    assert not model.training


def test_it_holds_live_values_alone_under_the_original_keys(run: Path) -> None:
    loaded, wanted = load_run(run), plain(run).state_dict()
    state = loaded.module.state_dict()
    assert state.keys() == wanted.keys()
    for weight in loaded.weights:
        assert weight.kernel == ("dense" if excuse() else "sparse")
        held = wanted[weight.fqn].numel() if excuse() else int(wanted[weight.fqn].count_nonzero())
        assert state[weight.fqn].shape == (held, 1)
    assert not loaded.module.training
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())


@pytest.mark.parametrize(("values", "tolerance"), [("bf16", 0.02), ("int8", 0.1)])
def test_values_may_be_held_in_fewer_bits(run: Path, values: Any, tolerance: float) -> None:
    loaded, wanted = gapfx.load(run, values=values), plain(run)
    for batch in BATCHES:
        x = torch.randn(batch, 8)
        torch.testing.assert_close(loaded(x), wanted(x), rtol=0, atol=tolerance)
    assert loaded.get_parameter("blocks.0.up.weight").dtype != torch.float32


@pytest.mark.parametrize("batch", [3, 64])
def test_a_compiled_or_exported_one_equals_eager(run: Path, batch: int) -> None:
    loaded, x = gapfx.load(run), torch.randn(batch, 8)
    compiled: Any = torch.compile(loaded, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), loaded(x))
    exported = torch.export.export(loaded, (x,))
    assert torch.equal(exported.module()(x), loaded(x))
    ops = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    ops = [op for op in ops if op.startswith("gapfx")]
    assert ops == ["gapfx.fixed_linear.default"] * len(load_run(run).weights)


def test_autocast_is_that_of_the_dense_model(run: Path) -> None:
    loaded, wanted = gapfx.load(run), plain(run)
    for batch in (1, 64):
        x = torch.randn(batch, 8)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(loaded(x), wanted(x), rtol=0, atol=0.08)


def test_a_choice_may_be_forced_for_each_weight(run: Path) -> None:
    fqn = "blocks.0.up.weight"
    loaded = load_run(run, kernels={fqn: "dense"})
    served = next(weight for weight in loaded.weights if weight.fqn == fqn)
    assert (served.kernel, served.reason) == ("dense", "asked for")
    assert loaded.module.get_parameter(fqn).numel() == 16 * 32
    x = torch.randn(3, 8)
    torch.testing.assert_close(loaded.module(x), plain(run)(x), rtol=0, atol=1e-5)
    assert loaded.kernel(fqn, 1) == "dense linear"
    with pytest.raises(UserError, match="'nonsense' is no planned weight"):
        load_run(run, kernels={"nonsense": "dense"})


@needs_kernels
def test_each_number_of_tokens_has_its_kernel(run: Path) -> None:
    loaded = load_run(run)
    assert {loaded.kernel("blocks.1.up.weight", tokens) for tokens in (1, 15)} <= {"mask", "columns"}
    assert loaded.kernel("blocks.1.up.weight", 16) == "panels"


def test_what_no_kernel_takes_is_named_dense(run: Path) -> None:
    loaded = load_run(run)
    loaded.module.double()
    assert {loaded.kernel("blocks.1.up.weight", tokens) for tokens in (1, 16)} == {"dense linear"}


def test_a_run_may_be_loaded_and_run_in_inference_mode(run: Path) -> None:
    x = torch.randn(3, 8)
    with torch.inference_mode():
        loaded = gapfx.load(run)
        torch.testing.assert_close(loaded(x), plain(run)(x), rtol=0, atol=1e-5)
    assert not any(tensor.is_inference() for tensor in loaded.state_dict().values())
    assert not any(buffer.is_inference() for buffer in loaded.buffers())


class Tied(nn.Module):
    """An embedding that is also the head, around a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(24, 16), nn.Linear(16, 16), nn.Linear(16, 24, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.inner(self.table(tokens)).relu())


class Mixed(nn.Module):
    """A convolution, attention and an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 16, 3, padding=1)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.lstm, self.out = nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).transpose(1, 2)
        x = x + self.attention(x, x, x)[0]
        return self.out(self.lstm(x)[0])


@pytest.mark.parametrize("values", ["fp32", "bf16"])
def test_tied_weights_stay_tied(tmp_path: Path, values: Any) -> None:
    tokens, model = torch.randint(24, (2, 9)), Tied()
    every = {"table.weight": "linear", "inner.weight": "linear"}
    path = a_run_of(tmp_path / "run", model, (tokens,), sparsity=0.8, dense=())
    loaded = load_run(path, model=Tied, args=(tokens,), values=values)
    assert {weight.fqn for weight in loaded.weights} <= every.keys()
    tolerance = 1e-5 if values == "fp32" else 0.05
    torch.testing.assert_close(loaded.module(tokens), model.eval()(tokens), rtol=0, atol=tolerance)
    assert loaded.module.get_parameter("head.weight") is loaded.module.get_parameter("table.weight")


@pytest.mark.parametrize("values", ["fp32", "int8"])
def test_convolutions_attention_and_recurrent_layers_load(tmp_path: Path, values: Any) -> None:
    x, model = torch.randn(4, 6, 10), Mixed()
    path = a_run_of(tmp_path / "run", model, (x,), sparsity=0.8)
    loaded = load_run(path, model=Mixed(), args=(x,), values=values)
    uses = {weight.fqn: weight.use for weight in loaded.weights}
    assert uses["conv.weight"] == ("dense" if excuse() else "convolution")
    assert uses["lstm.weight_ih_l0"] == uses["attention.in_proj_weight"] == "dense"
    assert loaded.kernel("conv.weight", 10) == ("dense" if excuse() else "sparse convolution")
    assert loaded.kernel("lstm.weight_ih_l0", 10) == "dense"
    tolerance = 1e-5 if values == "fp32" else 0.1
    for batch in (1, 4):
        given = x[:batch]
        torch.testing.assert_close(loaded.module(given), model.eval()(given), rtol=0, atol=tolerance)


def test_a_weight_that_layers_read_may_be_kept_dense(tmp_path: Path) -> None:
    x, model, fqn = torch.randn(4, 6, 10), Mixed(), "attention.in_proj_weight"
    path = a_run_of(tmp_path / "run", model, (x,), sparsity=0.8)
    loaded = load_run(path, model=Mixed(), args=(x,), kernels={fqn: "dense"})
    assert next(weight.reason for weight in loaded.weights if weight.fqn == fqn) == "asked for"
    assert loaded.module.state_dict()[fqn].numel() == 48 * 16
    torch.testing.assert_close(loaded.module(x), model.eval()(x), rtol=0, atol=1e-5)


def test_without_kernels_a_linear_layer_says_why_it_is_dense(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "missing_reason", lambda: "not built")
    loaded = load_run(run)
    assert {(w.kernel, w.reason) for w in loaded.weights} == {("dense", "no native kernels: not built")}
    assert {loaded.kernel(weight.fqn, 1) for weight in loaded.weights} == {"dense linear"}


def test_a_weight_without_any_live_value_loads(tmp_path: Path) -> None:
    x, model = torch.randn(3, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    path = a_run_of(tmp_path / "run", model, (x,), sparsity=0.5, groups=1)
    state = load_file(path / "model.safetensors")
    state["0.weight"].zero_()
    save_file(state, path / "model.safetensors")
    model.load_state_dict(state)
    loaded = gapfx.load(path, model=nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), args=(x,))
    torch.testing.assert_close(loaded(x), model.eval()(x), rtol=0, atol=1e-6)


def damaged(run: Path, folder: Path, without: str) -> Path:
    """A copy of the run's files but one."""
    folder.mkdir()
    for name in ("config.json", "plan.json", "task.json", "summary.json", "model.safetensors"):
        if name != without:
            (folder / name).write_bytes((run / name).read_bytes())
    return folder


def test_no_run_and_an_unfinished_run_are_told(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        gapfx.load(tmp_path)
    with pytest.raises(UserError, match="is not finished"):
        gapfx.load(damaged(run, tmp_path / "unfinished", "summary.json"))


def test_a_task_file_that_is_gone_is_told_and_not_needed_with_a_model(run: Path, tmp_path: Path) -> None:
    moved = damaged(run, tmp_path / "moved", "task.json")
    with pytest.raises(UserError, match="does not say which task"):
        gapfx.load(moved)
    (moved / "task.json").write_text(json.dumps({"path": str(tmp_path / "gone.py"), "entry": "model"}))
    with pytest.raises(UserError, match=r"the task file .*gone.py of the run is gone"):
        gapfx.load(moved)
    x, model = torch.randn(4, 8), load_task(runs.TASK).model()
    assert torch.equal(gapfx.load(moved, model=model, args=(x,))(x), gapfx.load(run)(x))


@pytest.mark.parametrize("size", [0, 5, 1000])
def test_a_model_file_that_is_cut_off_is_told(run: Path, tmp_path: Path, size: int) -> None:
    cut = damaged(run, tmp_path / "cut", "model.safetensors")
    (cut / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:size])
    with pytest.raises(UserError, match="the model of the run cannot be read") as caught:
        gapfx.load(cut)
    assert "--resume" in caught.value.fix
    assert caught.value.where == str(cut / "model.safetensors")


def test_options_that_are_none_are_told(run: Path) -> None:
    wrong: Any = "fp16"
    with pytest.raises(UserError, match="values may not be 'fp16'"):
        gapfx.load(run, values=wrong)
    with pytest.raises(UserError, match="kernels may not be 'fp16'"):
        gapfx.load(run, kernels={"blocks.0.up.weight": wrong})
    with pytest.raises(UserError, match="args are given without a model"):
        gapfx.load(run, args=(torch.randn(1, 8),))


def test_devices_on_which_nothing_is_served_are_told(run: Path) -> None:
    with pytest.raises(UserError, match="models are not served on meta"):
        gapfx.load(run, device="meta")


def test_a_missing_cuda_device_is_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch finds no CUDA device here"):
        gapfx.load(run, device="cuda")


def test_a_model_for_cuda_tells_of_each_weight_what_serves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, args = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)), (torch.randn(3, 64),)
    folder = a_run_of(tmp_path / "run", model, args, pattern="2:4", sparsity=0.5)
    # A device that is not here: the module stays on the CPU, and the format is the weight itself.
    monkeypatch.setattr(loading, "_checked_device", lambda device, values: torch.device("cuda"))
    monkeypatch.setattr(loading, "capability_of", lambda device: (9, 0))
    monkeypatch.setattr(two_of_four, "packed", lambda weight: weight)
    monkeypatch.setattr(nn.Module, "to", lambda self, device, dtype: self.bfloat16())
    fresh = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    loaded = load_run(folder, model=fresh, args=args, values="bf16", device="cuda")
    first, second = loaded.weights
    assert (first.kernel, first.use, first.sparsity, first.reason) == ("sparse", "2:4", 0.5, "")
    assert (second.kernel, second.reason) == ("dense", "2:4 takes multiples of 32 outputs and 64 inputs")
    assert [loaded.kernel(weight.fqn, 8) for weight in loaded.weights] == ["sparse 2:4", "dense"]
    wanted = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    wanted.load_state_dict(load_file(folder / "model.safetensors"))
    x = torch.randn(5, 64).bfloat16()
    assert torch.equal(loaded.module(x), wanted.bfloat16()(x))


@pytest.mark.gpu
def test_a_run_on_cuda_computes_what_the_dense_model_does(tmp_path: Path) -> None:
    model, args = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)), (torch.randn(3, 64),)
    folder = a_run_of(tmp_path / "run", model, args, pattern="2:4", sparsity=0.5)
    fresh = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    loaded = load_run(folder, model=fresh, args=args, values="bf16", device="cuda")
    assert loaded.weights[0].kernel == "sparse"
    wanted = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    wanted.load_state_dict(load_file(folder / "model.safetensors"))
    x = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(loaded.module(x), wanted.to("cuda", torch.bfloat16)(x), rtol=2e-2, atol=2e-2)


def test_another_model_is_told(run: Path) -> None:
    with pytest.raises(UserError, match=r"of another model: it has no '0.bias'"):
        gapfx.load(run, model=nn.Sequential(nn.Linear(8, 8)), args=(torch.randn(1, 8),))
    wider = load_task(runs.TASK).model()
    wider.head = nn.Linear(16, 5)
    with pytest.raises(UserError, match=r"head.* is \[5"):
        gapfx.load(run, model=wider, args=(torch.randn(1, 8),))
