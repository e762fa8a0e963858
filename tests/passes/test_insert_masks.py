"""Mask ops in owners: edits, bits, gradients, and an untouched model where every bit is 1."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gapfx.compiler import Pipeline, Unit, realise
from gapfx.errors import PlanError
from gapfx.masks import bits_of, pack, stored_parameter, write_bits
from gapfx.passes import AllocateSparsity, InsertMasks
from gapfx.plan import Group, Plan, Weight
from tests.masking import EVERYTHING, assert_same, masked, planned, run
from tests.models import CASES, LanguageModel, captured, mlp, tokens


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_all_true_masks_change_no_bit_of_outputs_and_gradients(name: str, training: bool) -> None:
    unit, plain, inputs = masked(name)
    model = unit.capture.model
    expected, gradients = run(plain.train(training), inputs)
    output, found = run(model.train(training), inputs)
    assert torch.equal(output, expected)
    assert_same(found, gradients)


@pytest.mark.parametrize("name", CASES)
def test_all_true_masks_change_no_bit_of_inference(name: str) -> None:
    """With gradients off, where torch takes its fast paths.

    Frozen on both sides: torch adds in another order when a weight requires a gradient.
    """
    unit, plain, inputs = masked(name)
    model = unit.capture.model
    with torch.no_grad():
        for module in (plain, model):
            module.eval().requires_grad_(False)
        assert torch.equal(model(*inputs), plain(*inputs))


@pytest.mark.parametrize("name", CASES)
def test_masked_weights_act_as_zeros_and_get_no_gradient(name: str) -> None:
    unit, plain, inputs = masked(name)
    model = unit.capture.model
    masks: dict[str, Tensor] = {}
    for weight in planned(unit):
        masks[weight.fqn] = torch.rand(weight.shape) < 0.5
        for fqn in (weight.fqn, *weight.aliases):
            write_bits(model, fqn, pack(masks[weight.fqn]))
        stored_parameter(plain, weight.fqn).data.masked_fill_(~masks[weight.fqn], 0)
    expected, gradients = run(plain, inputs)
    output, found = run(model, inputs)
    assert torch.equal(output, expected)
    for fqn, mask in masks.items():
        gradient = gradients[fqn]
        gradients[fqn] = None if gradient is None else gradient.masked_fill(~mask, 0)
    assert_same(found, gradients)


@pytest.mark.parametrize("name", CASES)
def test_two_nodes_are_added_for_each_planned_weight_in_each_owner(name: str) -> None:
    make, inputs = CASES[name]
    unit = Unit(captured(make(), *inputs()))
    before = unit.num_nodes()
    EVERYTHING.run(unit)
    places = sum(1 + len(weight.aliases) for weight in planned(unit))
    assert unit.num_nodes() - before == 2 * places


@pytest.mark.parametrize("name", CASES)
def test_a_second_run_changes_nothing(name: str) -> None:
    unit, _, _ = masked(name)
    classes = [type(module) for module in unit.capture.model.modules()]
    bits = {name: buffer for name, buffer in unit.capture.model.named_buffers() if "_gapfx_mask_" in name}
    text = unit.text()
    assert InsertMasks().apply(unit) is False
    realise(unit)
    assert unit.text() == text
    assert [type(module) for module in unit.capture.model.modules()] == classes
    now = {name: buffer for name, buffer in unit.capture.model.named_buffers() if "_gapfx_mask_" in name}
    assert list(now) == list(bits)
    assert all(now[name] is bits[name] for name in bits)


def test_realising_again_keeps_the_bits() -> None:
    unit, _, _ = masked("mlp")
    write_bits(unit.capture.model, "0.weight", pack(torch.zeros(8, 6, dtype=torch.bool)))
    EVERYTHING.run(unit)
    realise(unit)
    assert bits_of(unit.capture.model, "0.weight").sum() == 0


@pytest.mark.parametrize("name", CASES)
def test_names_keys_and_classes_stay(name: str) -> None:
    unit, plain, _ = masked(name)
    model = unit.capture.model
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [fqn for fqn, _ in model.named_parameters()] == [fqn for fqn, _ in plain.named_parameters()]
    for module, before in zip(model.modules(), plain.modules(), strict=True):
        assert isinstance(module, type(before))
        for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
            assert getattr(type(module), attribute) == getattr(type(before), attribute)
    assert repr(model) == repr(plain)


@pytest.mark.parametrize("name", CASES)
def test_state_loads_into_and_out_of_a_masked_model(name: str) -> None:
    unit, plain, inputs = masked(name)
    other = copy.deepcopy(plain)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    unit.capture.model.load_state_dict(other.state_dict())
    assert torch.equal(run(unit.capture.model, inputs)[0], run(other, inputs)[0])
    plain.load_state_dict(unit.capture.model.state_dict())
    assert torch.equal(run(plain, inputs)[0], run(other, inputs)[0])


def test_equal_layers_share_one_class() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(8, 4, bias=False))
    realise(EVERYTHING.run(Unit(captured(model, torch.randn(2, 4)))))
    assert type(model[0]) is type(model[1])
    assert type(model[0]) is not nn.Linear


def test_hooks_stay() -> None:
    model = mlp()
    calls: list[str] = []
    model.get_submodule("2").register_forward_hook(lambda *_: calls.append("forward"))
    model.get_submodule("2").register_full_backward_hook(lambda *_: calls.append("backward"))
    realise(EVERYTHING.run(Unit(captured(model, torch.randn(2, 6)))))
    calls.clear()
    run(model, (torch.randn(2, 6),))
    assert calls == ["forward", "backward"]


@pytest.mark.parametrize("name", CASES)
def test_a_deep_copy_works_and_its_masks_are_its_own(name: str) -> None:
    unit, _, inputs = masked(name)
    model = unit.capture.model
    expected = run(model, inputs)[0]
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, inputs)[0], expected)
    for weight in planned(unit):
        for fqn in (weight.fqn, *weight.aliases):
            write_bits(twin, fqn, torch.zeros_like(bits_of(twin, fqn)))
    assert not torch.equal(run(twin, inputs)[0], expected)
    assert torch.equal(run(model, inputs)[0], expected)


def test_masks_follow_the_module_to_another_dtype() -> None:
    unit, plain, (memory, target) = masked("transformer")
    inputs = (memory.double(), target.double())
    model = unit.capture.model.double()
    assert {buffer.dtype for buffer in model.buffers()} == {torch.uint8}
    assert torch.equal(run(model, inputs)[0], run(plain.double(), inputs)[0])


def test_bits_of_a_weight_start_as_ones_and_are_not_saved() -> None:
    unit, _, _ = masked("mlp")
    bits = bits_of(unit.capture.model, "4.weight")
    assert bits.tolist() == [255, 255, 255]
    assert not any("_gapfx" in key for key in unit.capture.model.state_dict())


def test_a_meta_model_is_masked_without_storage() -> None:
    model = mlp().to("meta")
    realise(EVERYTHING.run(Unit(captured(model, torch.randn(2, 6, device="meta")))))
    assert bits_of(model, "0.weight").is_meta
    assert model(torch.randn(2, 6, device="meta")).shape == (2, 3)


class CountMasks(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.gapfx.mask.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "count"), [("mlp", 3), ("cnn", 3), ("lstm", 10), ("tied", 2), ("attention", 8)])
def test_a_forward_masks_each_weight_once(name: str, count: int) -> None:
    """Attention reads its packed projection a second time, for its dtype."""
    unit, _, inputs = masked(name)
    with CountMasks() as counter:
        unit.capture.model(*inputs)
    assert counter.count == count


def test_a_weight_that_zero_took_away_is_read_as_it_is() -> None:
    unit, _, _ = masked("attention")
    attention: Any = unit.capture.model.get_submodule("attention")
    stored_parameter(attention, "in_proj_weight").data = torch.empty(0)
    assert attention.in_proj_weight is stored_parameter(attention, "in_proj_weight")


def test_a_weight_of_another_size_than_its_mask_is_an_error() -> None:
    unit, _, inputs = masked("attention")
    stored_parameter(unit.capture.model, "attention.in_proj_weight").data = torch.zeros(24, 9)
    with pytest.raises(RuntimeError):
        unit.capture.model(*inputs)


def test_masked_models_compile_as_one_graph() -> None:
    unit, _, inputs = masked("attention")
    compiled = torch.compile(unit.capture.model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*inputs), unit.capture.model(*inputs))


def test_reads_get_the_masked_weight_in_form_read_and_the_parameter_in_form_forward() -> None:
    unit, _, _ = masked("attention")
    attention: Any = unit.capture.model.get_submodule("attention")
    assert not isinstance(attention.in_proj_weight, nn.Parameter)
    assert isinstance(masked("mlp")[0].capture.model.get_submodule("0").weight, nn.Parameter)


def hand_plan(*weights: Weight) -> Plan:
    return Plan((Group("all", weights),))


def test_a_plan_by_hand_masks_what_it_names() -> None:
    unit = Unit(captured(mlp(), torch.randn(2, 6)))
    unit.assume(AllocateSparsity, hand_plan(Weight("2.weight", (8, 8), 0.5)))
    Pipeline((InsertMasks(),)).run(unit)
    realise(unit)
    assert [name for name, _ in unit.capture.model.named_buffers()] == ["2._gapfx_mask_weight"]


def test_a_planned_parameter_that_cannot_be_masked_is_refused_with_the_reason() -> None:
    unit = Unit(captured(LanguageModel(), tokens()))
    unit.assume(AllocateSparsity, hand_plan(Weight("positions", (1, 6, 8), 0.5)))
    assert InsertMasks().apply(unit) is False
    assert unit.refusals == [("positions", "the recorded forward does not multiply, convolve or look up with it")]


def test_a_plan_of_another_model_is_refused() -> None:
    unit = Unit(captured(mlp(), torch.randn(2, 6)))
    unit.assume(AllocateSparsity, hand_plan(Weight("7.weight", (8, 8), 0.5)))
    with pytest.raises(PlanError, match=r"it has no parameter '7.weight'"):
        Pipeline((InsertMasks(),)).run(unit)


@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm", "tied", "experts"])
def test_masks_run_where_the_parameters_are_gathered(name: str) -> None:
    """Every parameter exists only while its own module runs, as under ZeRO-3."""
    unit, plain, inputs = masked(name)
    expected = plain.eval()(*inputs)
    values = {parameter: parameter.data for parameter in unit.capture.model.parameters()}
    for module in unit.capture.model.eval().modules():
        _take_parameters_away(module, values)
    assert torch.equal(unit.capture.model(*inputs), expected)


def _take_parameters_away(module: nn.Module, values: dict[nn.Parameter, Tensor]) -> None:
    own = list(module.parameters(recurse=False))

    def gather(*_: Any) -> None:
        for parameter in own:
            parameter.data = values[parameter]

    def release(*_: Any) -> None:
        for parameter in own:
            parameter.data = torch.empty(0)

    release()
    module.register_forward_pre_hook(gather)
    module.register_forward_hook(release)
