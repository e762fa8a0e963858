"""Masking in place: the weights of ScriptModules stay 0 where they are masked, whatever is done to the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import gapfx
from gapfx.compiler import Unit, parse_pipeline, realise
from gapfx.errors import CaptureError
from gapfx.in_place import InPlaceMasks
from gapfx.masks import bits_of, stored_parameter
from gapfx.owners import build_owners
from gapfx.runtime.module_masks import put_bits
from gapfx.runtime.skeleton import module_from, skeleton_of
from gapfx.sparse import Sparse
from tests.masking import run
from tests.models import captured
from tests.runs import gapfx as command
from tests.runs import summary, weights

TASK = Path(__file__).parent / "tasks" / "scripted_training.py"
SCRIPTED = ("body.0.weight", "body.2.weight")


class Mixed(nn.Module):
    """A ScriptModule of two layers before a plain one."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
        self.body = cast(nn.Module, torch.jit.script(layers))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def made() -> tuple[Sparse, Tensor]:
    model, x = Mixed(), torch.randn(5, 6)
    return gapfx.sparsify(model, (x,), sparsity=0.5), x


def masked_values(sparse: Sparse, model: nn.Module | None = None) -> Tensor:
    """Every value under a mask of the ScriptModule."""
    found = [stored_parameter(model or sparse.module, fqn)[~sparse.masks[fqn]] for fqn in SCRIPTED]
    return torch.cat(found).detach()


def masked_gradients(sparse: Sparse) -> Tensor:
    gradients = {fqn: stored_parameter(sparse.module, fqn).grad for fqn in SCRIPTED}
    return torch.cat([cast(Tensor, gradients[fqn])[~sparse.masks[fqn]] for fqn in SCRIPTED])


def by_hand(model: nn.Module, sparse: Sparse) -> nn.Module:
    with torch.no_grad():
        for fqn, mask in sparse.masks.items():
            model.get_parameter(fqn).mul_(mask)
    return model


def test_weights_of_a_script_module_are_owned_in_place_with_the_reason() -> None:
    owners = build_owners(captured(Mixed(), torch.randn(5, 6)))
    reason = "body.0 is a ScriptModule: it runs outside of Python"
    assert (owners["body.0"].form, owners["body.0"].reason) == ("in-place", reason)
    assert owners["head"].form == "forward"


def test_a_masked_step_equals_masks_multiplied_in_by_hand() -> None:
    torch.manual_seed(3)
    plain = Mixed()
    torch.manual_seed(3)
    model, x = Mixed(), torch.randn(5, 6)
    sparse = gapfx.sparsify(model, (x,), sparsity=0.5)
    expected, gradients = run(by_hand(plain, sparse), (x,))
    got, own = run(model, (x,))
    assert torch.equal(got, expected)
    for fqn, gradient in gradients.items():
        assert gradient is not None
        mask = sparse.masks[fqn] if fqn in sparse.masks else torch.ones_like(gradient)
        assert torch.equal(cast(Tensor, own[fqn]), gradient * mask), fqn


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda params: torch.optim.Adam(params, lr=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_stay_zero_and_their_gradients_too_while_others_train(optimizer: str) -> None:
    sparse, x = made()
    steps = OPTIMIZERS[optimizer](sparse.module.parameters())
    before = {fqn: stored_parameter(sparse.module, fqn).detach().clone() for fqn in SCRIPTED}
    for _ in range(5):
        steps.zero_grad()
        sparse.module(x).square().sum().backward()
        assert masked_gradients(sparse).count_nonzero() == 0
        steps.step()
        assert masked_values(sparse).count_nonzero() == 0
    for fqn, old in before.items():
        mask = sparse.masks[fqn]
        assert not torch.equal(old[mask], stored_parameter(sparse.module, fqn)[mask]), f"{fqn} trains"


def test_a_loaded_state_is_masked_from_the_next_forward_on() -> None:
    sparse, x = made()
    sparse.module.load_state_dict({key: torch.ones_like(value) for key, value in sparse.module.state_dict().items()})
    assert masked_values(sparse).count_nonzero() > 0
    sparse.module(x)
    assert masked_values(sparse).count_nonzero() == 0
    assert list(sparse.module.state_dict()) == list(Mixed().state_dict())


def test_a_deep_copy_masks_its_own_weights_by_its_own_masks() -> None:
    sparse, x = made()
    twin = copy.deepcopy(sparse.module)
    twin.get_submodule("").get_buffer("_gapfx_mask_body:0:weight").fill_(255)
    with torch.no_grad():
        for fqn in SCRIPTED:
            stored_parameter(twin, fqn).fill_(1)
            stored_parameter(sparse.module, fqn).fill_(1)
    twin(x)
    sparse.module(x)
    assert bool(stored_parameter(twin, "body.0.weight").all()), "its mask keeps everything now"
    assert masked_values(sparse).count_nonzero() == 0
    mask = sparse.masks["body.2.weight"]
    assert torch.equal(stored_parameter(twin, "body.2.weight").detach(), mask.float())


def test_another_mask_holds_from_the_next_forward_on() -> None:
    sparse, x = made()
    sparse.module(x).sum().backward()
    for fqn in SCRIPTED:
        sparse.set_mask(fqn, torch.rand(sparse.masks[fqn].shape) < 0.5)
    assert masked_values(sparse).count_nonzero() == 0
    sparse.module.zero_grad()
    sparse.module(x).square().sum().backward()
    assert masked_gradients(sparse).count_nonzero() == 0
    grown = {fqn: torch.ones_like(sparse.masks[fqn]) for fqn in SCRIPTED}
    for fqn, mask in grown.items():
        sparse.set_mask(fqn, mask)
    sparse.module.zero_grad()
    sparse.module(x).square().sum().backward()
    gradients = [cast(Tensor, stored_parameter(sparse.module, fqn).grad) for fqn in SCRIPTED]
    assert all(bool(gradient.any()) for gradient in gradients), "what grew gets a gradient again"


def test_one_hook_masks_a_gradient_after_many_forwards() -> None:
    sparse, x = made()
    for _ in range(3):
        sparse.module(x)
    assert [len(stored_parameter(sparse.module, fqn)._backward_hooks or ()) for fqn in SCRIPTED] == [1, 1]


def test_folded_masks_leave_zeros_and_no_hook() -> None:
    model, x = Mixed(), torch.randn(5, 6)
    unit = Unit(captured(model, x))
    parse_pipeline("partition{groups=1},insert-masks").run(unit)
    realise(unit)
    assert [type(hook) for hook in vars(model)["_forward_pre_hooks"].values()] == [InPlaceMasks]
    model(x).sum().backward()
    bits_of(model, "body.0.weight").zero_()
    parse_pipeline("fold-masks").run(unit)
    realise(unit)
    assert not vars(model)["_forward_pre_hooks"]
    assert [name for name, _ in model.named_buffers()] == []
    assert stored_parameter(model, "body.0.weight").count_nonzero() == 0
    assert stored_parameter(model, "body.2.weight").count_nonzero() > 0
    model.zero_grad()
    model(x).sum().backward()
    assert stored_parameter(model, "body.2.weight").grad is not None


@pytest.mark.parametrize("is_empty", [True, False])
def test_a_weight_that_is_not_there_whole_is_an_error_in_the_forward(is_empty: bool) -> None:
    sparse, x = made()
    weight = stored_parameter(sparse.module, "body.0.weight")
    if is_empty:
        weight.data = torch.empty(0)
    else:
        weight.to_local = lambda: weight  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(RuntimeError, match=r"body\.0\.weight is masked in place, which needs the whole weight"):
        sparse.module(x)


def test_a_script_module_as_the_whole_model_is_refused() -> None:
    script = cast(nn.Module, torch.jit.script(nn.Linear(4, 4)))
    with pytest.raises(CaptureError, match="the model is a ScriptModule"):
        gapfx.sparsify(script, (torch.randn(2, 4),))


def test_a_skeleton_of_the_runtime_is_filled_with_leaves_that_train_masked() -> None:
    sparse, x = made()
    values = {fqn: torch.ones_like(parameter) for fqn, parameter in sparse.module.named_parameters()}
    fresh = module_from(skeleton_of(sparse.module), lambda fqn, parameter: values[fqn], torch.device("cpu"))
    assert all(parameter.is_leaf for parameter in fresh.parameters())
    for weight in sparse.plan.weights():
        put_bits(fresh, weight, bits_of(sparse.module, weight.fqn), None)
    fresh(x).square().sum().backward()
    assert masked_values(sparse, fresh).count_nonzero() == 0
    gradient = cast(Tensor, stored_parameter(fresh, "body.0.weight").grad)
    assert gradient[~sparse.masks["body.0.weight"]].count_nonzero() == 0
    assert bool(gradient.any())


def test_a_run_trains_a_model_with_a_script_module(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert command("sparsify", TASK, "--out", out) == 0
    facts, trained = summary(out)["per_weight"], weights(out)
    assert set(facts) == {"0.weight", "1.0.weight", "2.weight"}
    for fqn, fact in facts.items():
        assert fact["kept"] == fact["numel"] // 2
        assert int(trained[fqn].count_nonzero()) <= fact["kept"]
