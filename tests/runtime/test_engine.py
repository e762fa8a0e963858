"""A DeepSpeed engine for one phase against plain torch, and what is left of it when it is closed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gapfx.errors import UserError
from gapfx.plan import Plan
from gapfx.runtime.engine import Engine, EngineOptions, take_device
from gapfx.runtime.exchange import build_module, fill_engine, take_state
from gapfx.runtime.grow_prune import layout_of
from gapfx.runtime.skeleton import skeleton_of
from gapfx.runtime.state import TrainState, whole

Batch = tuple[Tensor, Tensor]
pytestmark = pytest.mark.usefixtures("in_process_group")


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def state_of(module: nn.Module) -> TrainState:
    """Its weights, all of them dense."""
    weights = {fqn: p.detach().flatten().clone() for fqn, p in module.named_parameters()}
    shapes = {fqn: tuple(p.shape) for fqn, p in module.named_parameters()}
    return TrainState(layout_of(shapes, Plan(())), weights)


def opened(module: nn.Module, optimizer: Any, options: EngineOptions, state: TrainState | None = None) -> Engine:
    """An engine that trains a copy of the module from a state, its own weights when none is given."""
    state = state_of(module) if state is None else state
    copy = build_module(Plan(()), skeleton_of(module), state, frozenset(), options)
    engine = Engine(copy, optimizer, options)
    fill_engine(engine, state)
    return engine


def taken(engine: Engine) -> TrainState:
    """What the engine holds."""
    state = state_of(make_model())
    take_state(engine, state, is_last=False)
    return state


def weights_of(engine: Engine) -> dict[str, Tensor]:
    state = taken(engine)
    return {fqn: whole(state, state.weights, fqn) for fqn in state.weights}


def batches(num: int) -> Iterator[list[Batch]]:
    """`num` steps of two micro-batches."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(num):
        x = torch.randn(2, 4, 8, generator=generator)
        yield [(x[i], x[i, :, :3].argmax(1)) for i in range(2)]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    weight = next(model.parameters())
    return F.cross_entropy(model(x.to(weight.dtype)).float(), y)


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def momentum(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e-2, momentum=0.9, weight_decay=0.1)


def plain_weights(factory: Any, num: int, clip: float) -> dict[str, Tensor]:
    model = make_model()
    optimizer = factory(list(model.parameters()))
    for step in batches(num):
        optimizer.zero_grad()
        for batch in step:
            (loss(model, batch) / len(step)).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return {fqn: p.detach() for fqn, p in model.named_parameters()}


def run(engine: Engine, steps: Iterator[list[Batch]]) -> list[float]:
    return [engine.train_step(step, loss, 1.0).loss for step in steps]


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return max(float((ours[fqn] - theirs[fqn]).abs().max()) for fqn in theirs)


@pytest.mark.parametrize("factory", [adamw, momentum])
@pytest.mark.parametrize("clip", [0.0, 0.2])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_fp32_steps_equal_plain_torch(factory: Any, clip: float, zero: int) -> None:
    engine = opened(make_model(), factory, EngineOptions(4, accumulation=2, clip=clip, zero_stage=zero))
    run(engine, batches(6))
    assert largest_difference(weights_of(engine), plain_weights(factory, 6, clip)) <= 1e-6
    engine.close()


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_the_gradient_norm_is_told_at_every_stage(zero: int) -> None:
    model = make_model()
    [step] = batches(1)
    for batch in step:
        (loss(model, batch) / 2).backward()
    expected = float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    engine = opened(make_model(), adamw, EngineOptions(4, accumulation=2, clip=0.1, zero_stage=zero))
    assert engine.train_step(step, loss, 1.0).grad_norm == pytest.approx(expected, rel=1e-5)
    engine.close()


def test_bf16_keeps_exact_fp32_masters() -> None:
    model = make_model()
    before = {fqn: p.detach().clone() for fqn, p in model.named_parameters()}
    engine = opened(model, adamw, EngineOptions(4, dtype="bf16"))
    assert next(engine.module.parameters()).dtype is torch.bfloat16
    assert largest_difference(weights_of(engine), before) == 0
    engine.close()


def test_bf16_steps_stay_near_fp32() -> None:
    engine = opened(make_model(), momentum, EngineOptions(4, accumulation=2, dtype="bf16"))
    run(engine, batches(6))
    assert largest_difference(weights_of(engine), plain_weights(momentum, 6, 1.0)) <= 5e-3
    engine.close()


@pytest.mark.parametrize("factory", [adamw, momentum])
@pytest.mark.parametrize(
    ("dtype", "zeros"),
    [
        *(("fp32", zeros) for zeros in ((0, 0), (1, 1), (2, 3), (3, 3), (3, 1), (1, 0))),
        *(("bf16", zeros) for zeros in ((1, 1), (2, 3), (3, 3), (3, 1))),  # stage 0 is refused
    ],
)
def test_a_second_engine_continues_bit_for_bit(factory: Any, zeros: tuple[int, int], dtype: Any) -> None:
    first_options, second_options = (EngineOptions(4, 2, 0.0, dtype, zero_stage=zero) for zero in zeros)
    whole_run = opened(make_model(), factory, first_options)
    run(whole_run, batches(6))
    expected = weights_of(whole_run)
    whole_run.close()
    first = opened(make_model(), factory, first_options)
    steps = list(batches(6))
    run(first, iter(steps[:3]))
    state = taken(first)
    first.close()
    second = opened(make_model(), factory, second_options, state)
    run(second, iter(steps[3:]))
    assert largest_difference(weights_of(second), expected) <= (0 if zeros[0] == zeros[1] else 3e-7)
    second.close()


def two_groups(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    groups = [{"params": params[::2], "weight_decay": 0.1}, {"params": params[1::2], "lr": 2e-2}]
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0)


def momentum_in_one_group(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": params[:2]}, {"params": params[2:], "momentum": 0.9}], lr=1e-2)


def check_two_engines(factory: Any, zero: int) -> None:
    """Four steps, two in each of two engines, equal those of plain torch."""
    options, steps = EngineOptions(4, 2, 0.0, zero_stage=zero), list(batches(4))
    first = opened(make_model(), factory, options)
    run(first, iter(steps[:2]))
    state = taken(first)
    first.close()
    second = opened(make_model(), factory, options, state)
    run(second, iter(steps[2:]))
    assert largest_difference(weights_of(second), plain_weights(factory, 4, 0.0)) <= 1e-6
    second.close()


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("factory", [two_groups, momentum_in_one_group])
def test_every_parameter_group_keeps_its_state(factory: Any, zero: int) -> None:
    check_two_engines(factory, zero)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_gradients_of_bf16_weights_add_up_in_fp32_where_the_file_says_so(zero: int) -> None:
    added = {"data_types": {"grad_accum_dtype": "fp32"}}
    options, steps = EngineOptions(4, 2, 0.0, "bf16", zero, deepspeed=added), list(batches(6))
    first = opened(make_model(), two_groups, options)
    run(first, iter(steps[:3]))
    state = taken(first)
    first.close()
    second = opened(make_model(), two_groups, options, state)
    run(second, iter(steps[3:]))
    assert largest_difference(weights_of(second), plain_weights(two_groups, 6, 0.0)) <= 2e-2
    second.close()


def test_the_last_look_at_an_engine_is_the_same_and_frees_it() -> None:
    engine = opened(make_model(), adamw, EngineOptions(4, accumulation=2))
    run(engine, batches(2))
    kept, last = taken(engine), state_of(make_model())
    take_state(engine, last, is_last=True)
    assert all(torch.equal(last.weights[fqn], kept.weights[fqn]) for fqn in kept.weights)
    assert last.optimizer.scalars == kept.optimizer.scalars
    for key, moments in kept.optimizer.moments.items():
        assert all(torch.equal(last.optimizer.moments[key][fqn], value) for fqn, value in moments.items())
    assert all(set(state) <= {"step"} for state in engine.optimizer.state.values())
    engine.close()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", [1, 3])
def test_frozen_parameters_and_those_of_no_optimizer_keep_their_values(zero: int, dtype: Any) -> None:
    model = make_model()
    next(iter(model.parameters())).requires_grad_(False)
    before = {fqn: p.detach().clone() for fqn, p in model.named_parameters()}
    state = state_of(model)
    engine = opened(model, lambda params: adamw(params[:-1]), EngineOptions(4, 2, dtype=dtype, zero_stage=zero), state)
    assert set(state.weights) == {"0.weight", "4.bias"}
    run(engine, batches(2))
    take_state(engine, state, is_last=True)
    for fqn, value in before.items():
        assert torch.equal(whole(state, state.weights, fqn), value) == (fqn in ("0.weight", "4.bias")), fqn
    engine.close()


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_closed_engines_leave_nothing_alive(zero: int) -> None:
    import deepspeed

    for _ in range(4):
        engine = opened(make_model(), adamw, EngineOptions(4, accumulation=2, zero_stage=zero))
        run(engine, batches(1))
        engine.close()
        del engine
    gc.collect()
    alive = [item for item in gc.get_objects() if type(item) is deepspeed.DeepSpeedEngine and vars(item)]
    assert len(alive) == 0


def test_an_optimizer_function_must_give_an_optimizer() -> None:
    def wrong(params: list[nn.Parameter]) -> Any:
        return params

    with pytest.raises(UserError, match=r"optimizer\(params\) returned a list"):
        opened(make_model(), wrong, EngineOptions(4))


class Cards:
    """A machine with GPUs, as DeepSpeed's accelerator tells of it."""

    def __init__(self, number: int) -> None:
        self.number, self.taken = number, list[int]()

    def device_count(self) -> int:
        return self.number

    def set_device(self, index: int) -> None:
        self.taken.append(index)


def test_each_rank_takes_its_own_gpu_before_any_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed.accelerator

    cards = Cards(4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(deepspeed.accelerator, "get_accelerator", lambda: cards)
    monkeypatch.setenv("LOCAL_RANK", "3")
    take_device()
    assert cards.taken == [3]
    cards.number = 2
    with pytest.raises(UserError, match="would be number 4 on a machine with 2 GPUs"):
        take_device()
