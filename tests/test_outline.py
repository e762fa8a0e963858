"""An outline mirrors the module tree, and its outputs, gradients and buffers equal eager exactly in train and eval."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gapfx.capture import capture, capture_eval, outline, tensors_in
from gapfx.emit import format_outline
from gapfx.errors import CaptureError
from tests.models import CASES, Mlp, captured, mlp, resnet50, resnet_input
from tests.test_capture import LanguageModel, Mixed, Recurrent, values


def outlined(model: nn.Module, *args: Any, **kwargs: Any) -> fx.GraphModule:
    """Recorded in train and in eval."""
    train, evaluation = (method(model, lambda m: m(*args, **kwargs)) for method in (capture, capture_eval))
    return outline(train, evaluation)


def bodies(tree: nn.Module) -> list[str]:
    """FQNs of the GraphModules."""
    return [fqn for fqn, module in tree.named_modules() if isinstance(module, fx.GraphModule)]


def check_equals_eager(model: nn.Module, *args: Any, **kwargs: Any) -> fx.GraphModule:
    """Compare in both modes exactly, lint every graph, and give the outline."""
    model.train()
    tree = outlined(model, *args, **kwargs)
    for module in tree.modules():
        if isinstance(module, fx.GraphModule):
            module.graph.lint()
    assert {id(p) for p in tree.parameters()} == {id(p) for p in model.parameters()}
    for mode in (True, False):
        model.train(mode)
        tree.train(mode)
        eager = values(model, model, *args, **kwargs)
        replayed = values(model, tree, *tensors_in((args, kwargs)))
        assert len(eager) == len(replayed)
        for expected, got in zip(eager, replayed, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
    return tree


def check_keeps_names(model: nn.Module, tree: fx.GraphModule) -> None:
    assert list(tree.state_dict()) == list(model.state_dict())
    assert [(fqn, id(p)) for fqn, p in tree.named_parameters()] == [(fqn, id(p)) for fqn, p in model.named_parameters()]


@pytest.mark.parametrize("name", [*CASES, "resnet"])
def test_shared_models_keep_their_values_and_names(name: str) -> None:
    make, inputs = {**CASES, "resnet": (resnet50, lambda: (resnet_input(),))}[name]
    model = make()
    check_keeps_names(model, check_equals_eager(model, *inputs()))


def test_a_called_module_is_a_graph_module_and_a_leaf_is_the_same_object() -> None:
    model = CASES["language-model"][0]()
    tree = outlined(model, *CASES["language-model"][1]())
    assert bodies(tree) == ["", "blocks.0", "blocks.1"]
    assert tree.get_submodule("blocks.0.up") is model.get_submodule("blocks.0.up")
    assert type(tree.get_submodule("blocks")) is nn.ModuleList


def test_dicts_keywords_dropout_ties_and_a_module_called_self() -> None:
    model = LanguageModel()
    tree = check_equals_eager(model, {"ids": torch.randint(0, 20, (2, 5))}, scale=0.5)
    check_keeps_names(model, tree)


def test_packed_sequences_pass_through() -> None:
    check_equals_eager(Recurrent(), torch.randn(3, 2, 3), torch.tensor([3, 2]), torch.randn(5, 2, 6))


def test_modes_writes_and_transforms() -> None:
    check_equals_eager(Mixed(), torch.randn(2, 4), torch.tensor([[True] * 4, [False] * 4]))


class Nested(nn.Module):
    """Runs its own module by a name that is awkward in generated code."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.called = name
        self.add_module(name, Mlp())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.get_submodule(self.called)(x)


@pytest.mark.parametrize("name", ["self", "torch", "0", "class", "input", "code", "graph", "meta"])
def test_awkward_module_names_are_kept(name: str) -> None:
    model = nn.Sequential(Nested(name))
    tree = check_equals_eager(model, torch.randn(2, 8))
    check_keeps_names(model, tree)
    assert bodies(tree) == ["", "0", f"0.{name}"]


def test_parameters_and_buffers_called_as_something_of_a_graph_module() -> None:
    class Names(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.graph = nn.Parameter(torch.randn(4, 4))
            self.register_buffer("meta", torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.graph + self.get_buffer("meta")

    model = nn.Sequential(Names(), nn.Linear(4, 4))
    check_keeps_names(model, check_equals_eager(model, torch.randn(2, 4)))


class Repeats(nn.Module):
    """Calls one module with inputs of other shapes, so that the code may differ between calls."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        long = self.module(torch.cat([x, x]))
        return self.module(self.module(x)) + long.reshape(2, *x.shape).sum(0)


class FlattensByShape(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.view(x.shape[0], -1)).view(x.shape[0], 8)


def test_calls_with_equal_code_share_one_body() -> None:
    model = Repeats(Mlp())
    tree = check_equals_eager(model, torch.randn(3, 8))
    check_keeps_names(model, tree)
    assert [node.target for node in tree.graph.find_nodes(op="call_module")] == ["module"] * 3


def test_calls_with_other_code_have_bodies_of_their_own_over_the_same_parameters() -> None:
    model = Repeats(FlattensByShape())
    tree = check_equals_eager(model, torch.randn(3, 8))
    check_keeps_names(model, tree)
    calls = [node.target for node in tree.graph.find_nodes(op="call_module")]
    assert calls == ["module", "module__call2", "module__call2"]


class Foreign(nn.Module):
    """Runs modules and reads a weight that it does not hold."""

    def __init__(self, block: nn.Module, linear: nn.Linear) -> None:
        super().__init__()
        self.held_elsewhere = (block, linear)
        self.own = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        block, linear = self.held_elsewhere
        return self.own(block(x)) + linear(x) + F.linear(x, linear.weight)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.linear = Mlp(), nn.Linear(8, 8)
        self.layers = nn.ModuleList(Foreign(self.block, self.linear) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.block(x)


def test_modules_and_weights_of_others_are_linked_and_passed_in() -> None:
    model = Shared()
    tree = check_equals_eager(model, torch.randn(2, 8))
    check_keeps_names(model, tree)
    layer = tree.get_submodule("layers.0")
    assert isinstance(layer, fx.GraphModule)
    calls = [node.target for node in layer.graph.find_nodes(op="call_module")]
    assert calls == ["_foreign_block", "own", "_foreign_linear"]
    assert len(layer.graph.find_nodes(op="placeholder")) == 2, "the foreign weight comes as an input"


def test_a_module_held_under_two_names_is_one_module_under_both() -> None:
    class Encoder(nn.Module):
        def __init__(self, table: nn.Embedding) -> None:
            super().__init__()
            self.table, self.mlp = table, Mlp()

        def forward(self, ids: Tensor) -> Tensor:
            return self.mlp(self.table(ids))

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 8)
            self.encoder, self.decoder = Encoder(self.table), Encoder(self.table)

        def forward(self, ids: Tensor) -> Tensor:
            return (self.encoder(ids) + self.decoder(ids)) @ self.table.weight.T

    model = Pair()
    tree = check_equals_eager(model, torch.arange(6).reshape(2, 3))
    check_keeps_names(model, tree)
    assert tree.get_submodule("decoder.table") is model.table


class Writes(nn.Module):
    """A child that writes into a view of what its caller goes on to use."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> None:
        x[:, :2].add_(self.linear(x.detach().clone())[:, :2])
        self.get_buffer("seen").add_(x.detach().mean(0))


def test_writes_through_views_reach_the_caller_in_order() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Writes(), Writes()

        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            before = y.sum()
            self.first(y)
            middle = y.sum()
            self.second(y)
            return y + before + middle

    model = Model()
    check_keeps_names(model, check_equals_eager(model, torch.randn(3, 4)))


class ByMode(nn.Module):
    """Other modules in train and in eval, and one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aux, self.head, self.unused = Mlp(), Mlp(), Mlp(), Mlp()

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.body(x)
        return [x, self.aux(x)] if self.training else [self.head(x)]


def test_the_mode_of_the_root_chooses_the_body_and_modules_never_called_stay() -> None:
    model = ByMode()
    tree = check_equals_eager(model, torch.randn(2, 8))
    check_keeps_names(model, tree)
    assert bodies(tree) == ["", "body", "aux"]
    assert tree.get_submodule("unused") is model.unused
    assert tree.get_submodule("head") is model.head


def test_a_recording_in_eval_puts_every_training_flag_back() -> None:
    model = nn.Sequential(Mlp(), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(8)))
    model.get_submodule("1.0").eval()
    flags = [module.training for module in model.modules()]
    seen: list[bool] = []

    def run(module: nn.Module) -> object:
        seen.extend(part.training for part in module.modules())
        return module(torch.randn(2, 8))

    capture_eval(model, run)
    assert not any(seen)
    assert [module.training for module in model.modules()] == flags
    with pytest.raises(CaptureError, match="the forward fails"):
        capture_eval(model, lambda module: module(torch.randn(2, 3)))
    assert [module.training for module in model.modules()] == flags


class Caches(nn.Module):
    """Keeps what it computed in eval, with its gradient, for the next forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.cache, self.calls = nn.Linear(4, 4), dict[str, Tensor](), list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(1)
        if self.training:
            return self.linear(x)
        return self.cache.setdefault("y", self.linear(x))


def test_caches_of_a_model_are_as_before_a_recording() -> None:
    model = Caches()
    outlined(model, torch.randn(2, 4))
    assert model.cache == {}
    assert model.calls == []


def test_recordings_of_two_models_are_refused() -> None:
    first, second = (captured(mlp(), torch.randn(2, 6)) for _ in range(2))
    with pytest.raises(CaptureError, match="are of different models"):
        outline(first, second)


def test_hooks_of_outlined_modules_fire_around_their_body() -> None:
    tree = outlined(nn.Sequential(Mlp(), Mlp()), torch.randn(2, 8))
    seen: list[str] = []
    for fqn in bodies(tree):
        tree.get_submodule(fqn).register_forward_hook(lambda *_, fqn=fqn: seen.append(fqn))
    tree(torch.randn(2, 8))
    assert seen == ["0", "1", ""]


def test_the_text_of_a_small_outline(golden: Callable[[str, str], None]) -> None:
    golden("outline", format_outline(outlined(Repeats(FlattensByShape()), torch.randn(3, 8))))
