"""What PyTorch does with modules it does with masked ones: copies, hooks, functional calls, compile, export."""

from __future__ import annotations

import copy
import io
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint, checkpoint_sequential  # pyright: ignore[reportUnknownVariableType]

import gapfx
from gapfx.masks import stored_parameter
from gapfx.runtime.launch import run_ranks
from gapfx.sparse import Sparse
from tests.models import CASES

NAMES = tuple(CASES)
TRACEABLE = ("mlp", "cnn", "transformer", "attention", "tied", "language-model")
Twin = Callable[[nn.Module], nn.Module]


def made(name: str) -> tuple[Sparse, nn.Module, tuple[Any, ...]]:
    """A sparse case without dropout, the plain model with its weights, and inputs."""
    torch.manual_seed(0)
    make, inputs = CASES[name][0], CASES[name][1]()
    model = make()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    plain = copy.deepcopy(model)
    sparse = gapfx.sparsify(model, inputs, sparsity=0.6)
    plain.load_state_dict(sparse.dense_state_dict())
    return sparse, plain, inputs


def flip(sparse: Sparse) -> None:
    """Other masks, and weights that are not 0 where they keep."""
    for fqn in sparse.masks:
        sparse.set_mask(fqn, ~sparse.masks[fqn])
        with torch.no_grad():
            stored_parameter(sparse.module, fqn).masked_fill_(sparse.masks[fqn], 0.3)


def gradients(model: nn.Module, names: Any) -> dict[str, Tensor | None]:
    return {fqn: stored_parameter(model, fqn).grad for fqn in names}


def assert_masked_like(model: nn.Module, sparse: Sparse, inputs: tuple[Any, ...]) -> None:
    """Same outputs, and gradients that are exact zeros where the masks drop."""
    model.zero_grad()
    output = model(*inputs)
    assert torch.equal(output, sparse.module(*inputs))
    output.square().sum().backward()
    for fqn, found in gradients(model, sparse.masks).items():
        if found is not None:
            assert not bool(found[~sparse.masks[fqn]].any()), fqn
            assert bool(found.any()), fqn


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("twin", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_masked_and_stands_alone(name: str, twin: Twin) -> None:
    sparse, _, inputs = made(name)
    other = twin(sparse.module)
    assert [type(module) for module in other.modules()] == [type(module) for module in sparse.module.modules()]
    assert list(other.state_dict()) == list(sparse.module.state_dict())
    assert_masked_like(other, sparse, inputs)
    before = other(*inputs)
    flip(sparse)
    assert torch.equal(other(*inputs), before)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_of_pickle_keeps_the_masks(protocol: int) -> None:
    sparse, _, inputs = made("lstm")
    assert_masked_like(pickle.loads(pickle.dumps(sparse.module, protocol)), sparse, inputs)


def test_a_saved_model_is_masked_in_another_process(tmp_path: Path) -> None:
    sparse, _, inputs = made("attention")
    torch.save((sparse, inputs, sparse.module(*inputs)), tmp_path / "model.pt")
    script = f"""
import torch
sparse, inputs, output = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
assert torch.equal(sparse.module(*inputs), output)
sparse.module(*inputs).sum().backward()
grad = sparse.module.attention._parameters["in_proj_weight"].grad
assert not grad[~sparse.masks["attention.in_proj_weight"]].any() and grad.any()
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_hooks_of_all_kinds_run_as_before() -> None:
    calls: list[str] = []
    sparse, _, inputs = made("mlp")
    layer = sparse.module.get_submodule("2")
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    stored_parameter(sparse.module, "2.weight").register_hook(lambda _: calls.append("gradient"))
    sparse.module(*inputs).sum().backward()
    assert calls == ["pre", "forward", "gradient", "backward"] or calls == ["pre", "forward", "backward", "gradient"]


@pytest.mark.parametrize("name", ["mlp", "cnn", "tied", "experts"])
def test_a_functional_call_masks_the_weights_that_it_is_given(name: str) -> None:
    sparse, plain, inputs = made(name)
    given = {fqn: torch.randn_like(value) for fqn, value in plain.named_parameters()}
    zeroed = {fqn: value.clone() for fqn, value in given.items()}
    for fqn in sparse.masks:
        zeroed[fqn].masked_fill_(~sparse.masks[fqn], 0)
    ours = functional_call(sparse.module, given, inputs)
    assert torch.equal(ours, functional_call(plain, zeroed, inputs))


def test_gradients_of_each_sample_are_masked() -> None:
    sparse, _, inputs = made("mlp")
    weights = {fqn: value.detach() for fqn, value in sparse.module.named_parameters()}

    def loss(weights: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(sparse.module, weights, (sample,)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(weights, inputs[0])
    for fqn in sparse.masks:
        assert not bool(found[fqn][:, ~sparse.masks[fqn]].any())
    one = grad(loss)(weights, inputs[0][1])
    torch.testing.assert_close(found["0.weight"][1], one["0.weight"])


def test_an_ensemble_keeps_the_masks_of_each_member() -> None:
    members = [made("mlp")[0] for _ in range(2)]
    flip(members[1])
    inputs = made("mlp")[2]
    weights, buffers = stack_module_state([sparse.module for sparse in members])

    def run(weights: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(members[0].module, (weights, buffers), inputs)

    found = vmap(run)(weights, buffers)
    for output, sparse in zip(found, members, strict=True):
        torch.testing.assert_close(output, sparse.module(*inputs))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    sparse, _, inputs = made("mlp")
    sparse.module(*inputs).square().sum().backward()
    wanted = {fqn: value.grad for fqn, value in sparse.module.named_parameters()}
    sparse.module.zero_grad()
    whole: Any = checkpoint(sparse.module, inputs[0].requires_grad_(), use_reentrant=use_reentrant)
    whole.square().sum().backward()
    for fqn, value in sparse.module.named_parameters():
        assert torch.equal(value.grad, wanted[fqn]), fqn  # pyright: ignore[reportArgumentType]
    parts: Any = checkpoint_sequential(sparse.module, 2, inputs[0], use_reentrant=use_reentrant)  # pyright: ignore[reportArgumentType]
    assert torch.equal(parts, whole)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "experts"])  # which do not run in it
def test_autocast_computes_what_it_computes_on_zeroed_weights(name: str) -> None:
    sparse, plain, inputs = made(name)
    with torch.autocast("cpu", torch.bfloat16):
        try:
            theirs = plain(*inputs)
        except RuntimeError as error:  # oneDNN has no LSTM in bfloat16 for processors without AVX-512
            assert name == "lstm"
            with pytest.raises(RuntimeError, match=re.escape(str(error))):
                sparse.module(*inputs)
            return
        ours = sparse.module(*inputs)
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)
    ours.float().square().sum().backward()
    for fqn, found in gradients(sparse.module, sparse.masks).items():
        assert found is None or not bool(found[~sparse.masks[fqn]].any()), fqn


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["mlp", "lstm", "attention"])
def test_a_model_can_be_cast_after_it_was_masked(name: str, dtype: torch.dtype) -> None:
    sparse, plain, inputs = made(name)
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    assert torch.equal(sparse.module.to(dtype)(*inputs), plain.to(dtype)(*inputs))
    assert all(bool((~mask).any()) for mask in sparse.masks.values())


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_a_parametrisation_on_top_sees_the_stored_weight(name: str) -> None:
    sparse, plain, inputs = made(name)
    for model in (sparse.module, plain):
        torch.manual_seed(1)
        parametrizations.weight_norm(model.get_submodule("0"))
    torch.testing.assert_close(sparse.module(*inputs), plain(*inputs))


@pytest.mark.parametrize("name", TRACEABLE)
def test_a_compiled_model_computes_the_same_and_follows_new_masks_without_compiling_again(name: str) -> None:
    sparse, _, inputs = made(name)
    counts: list[int] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        counts.append(1)
        return gm.forward

    torch.compiler.reset()
    compiled: Any = torch.compile(sparse.module, backend=backend, fullgraph=True)
    for change in (lambda: None, lambda: flip(sparse)):
        change()
        sparse.module.zero_grad()
        output = compiled(*inputs)
        torch.testing.assert_close(output, sparse.module(*inputs))
        output.square().sum().backward()
        for fqn, found in gradients(sparse.module, sparse.masks).items():
            assert found is not None
            assert not bool(found[~sparse.masks[fqn]].any()), fqn
    assert len(counts) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "cnn", "language-model"])
def test_inductor_computes_the_same(name: str) -> None:
    sparse, _, inputs = made(name)
    torch.compiler.reset()
    compiled: Any = torch.compile(sparse.module)
    output = compiled(*inputs)
    torch.testing.assert_close(output, sparse.module(*inputs))
    output.square().sum().backward()
    for fqn, found in gradients(sparse.module, sparse.masks).items():
        assert found is not None
        assert not bool(found[~sparse.masks[fqn]].any()), fqn


@pytest.mark.parametrize("name", TRACEABLE)
def test_an_exported_program_has_the_masks_and_computes_the_same(name: str) -> None:
    sparse, _, inputs = made(name)
    program = torch.export.export(sparse.module.eval(), inputs)
    ops = [node.target for node in program.graph.nodes]
    assert ops.count(torch.ops.gapfx.mask.default) >= len(sparse.masks)
    torch.testing.assert_close(program.module()(*inputs), sparse.module(*inputs))


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_steps_on_two_ranks_equal_those_of_one_process_and_keep_zeros(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    cases = ("mlp", "cnn", "transformer", "lstm", "attention", "tied", "language-model")
    assert run_ranks([sys.executable, "-m", "tests.sharded_steps", how, *cases], 2) == 0
