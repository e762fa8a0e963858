"""Modules without weights, and fresh modules from them."""

from __future__ import annotations

import torch
from torch import nn

import gapfx
from gapfx.masks import bits_of, stored_parameter
from gapfx.runtime.module_masks import put_bits
from gapfx.runtime.skeleton import hollow, module_from, skeleton_of
from tests.models import LanguageModel, Tagger, TiedPair, cnn, mlp, tokens

CPU = torch.device("cpu")


def filled(skeleton: nn.Module, weights: dict[str, torch.Tensor]) -> nn.Module:
    return module_from(skeleton, lambda fqn, parameter: weights[fqn].to(parameter.dtype, copy=True), CPU)


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {fqn: parameter.detach().clone() for fqn, parameter in module.named_parameters()}


def test_a_skeleton_holds_no_weights_and_keeps_shapes_types_and_flags() -> None:
    module = cnn().bfloat16()
    module.get_parameter("0.bias").requires_grad_(False)
    skeleton = skeleton_of(module)
    for (fqn, empty), (name, full) in zip(skeleton.named_parameters(), module.named_parameters(), strict=True):
        assert fqn == name
        assert empty.is_meta
        assert (empty.shape, empty.dtype, empty.requires_grad) == (full.shape, full.dtype, full.requires_grad)
        assert isinstance(empty, nn.Parameter)


def test_buffers_are_copied_and_the_module_is_left_alone() -> None:
    module = cnn()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    skeleton = skeleton_of(module)
    skeleton.get_buffer("1.running_mean").fill_(5)
    assert not skeleton.get_buffer("1.running_mean").is_meta
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_tied_parameters_stay_tied_in_skeletons_and_modules() -> None:
    for module in (TiedPair(), LanguageModel()):
        skeleton = skeleton_of(module)
        fresh = filled(skeleton, weights_of(module))
        names = ("first", "second") if isinstance(module, TiedPair) else ("tokens", "head")
        for made in (skeleton, fresh):
            assert made.get_submodule(names[0]).weight is made.get_submodule(names[1]).weight


def test_a_fresh_module_computes_the_same_and_shares_no_memory() -> None:
    module, x = cnn().eval(), torch.randn(2, 3, 8, 8)
    weights, skeleton = weights_of(module), skeleton_of(module)
    first, second = (filled(skeleton, weights) for _ in range(2))
    assert torch.equal(first(x), module(x))
    with torch.no_grad():
        first.get_parameter("0.weight").zero_()
        first.get_buffer("1.running_mean").fill_(9)
    assert torch.equal(second(x), module(x))
    assert torch.equal(weights["0.weight"], module.get_parameter("0.weight"))
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert not first.training


def test_whole_fp32_weights_become_the_modules_own_type() -> None:
    module = mlp().bfloat16()
    weights = {fqn: torch.randn(parameter.shape) for fqn, parameter in module.named_parameters()}
    fresh = filled(skeleton_of(module), weights)
    for fqn, parameter in fresh.named_parameters():
        assert torch.equal(parameter, weights[fqn].bfloat16())


def test_masked_modules_are_given_their_masks_also_where_weights_are_read_by_name() -> None:
    model = Tagger()
    sparse = gapfx.sparsify(model, (tokens(),), sparsity=0.5)
    skeleton = skeleton_of(model)
    fresh = filled(skeleton, weights_of(model))
    for weight in sparse.plan.weights():
        assert bits_of(fresh, weight.fqn).numel() == bits_of(skeleton, weight.fqn).numel() == 0
        put_bits(fresh, weight, bits_of(model, weight.fqn), None)
    assert torch.equal(fresh(tokens()), model(tokens()))
    for fqn in sparse.masks:
        assert bits_of(fresh, fqn) is not bits_of(model, fqn)
        assert torch.equal(bits_of(fresh, fqn), bits_of(model, fqn))
        assert stored_parameter(skeleton, fqn).is_meta


def test_each_parameter_is_placed_before_the_next_is_made() -> None:
    order: list[str] = []

    def value(fqn: str, parameter: torch.Tensor) -> torch.Tensor:
        order.append(f"make {fqn}")
        return torch.zeros(parameter.shape)

    module_from(skeleton_of(mlp()), value, CPU, lambda parameter: order.append(f"place {tuple(parameter.shape)}"))
    assert order[::2] == [f"make {fqn}" for fqn, _ in mlp().named_parameters()]
    assert order[1::2] == [f"place {tuple(parameter.shape)}" for parameter in mlp().parameters()]


def test_a_hollow_parameter_keeps_its_shape_and_no_memory() -> None:
    parameter = nn.Parameter(torch.randn(30, 40))
    hollow(parameter)
    assert parameter.shape == (30, 40)
    assert parameter.untyped_storage().nbytes() == 4
