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
from gapfx.runtime.engine import Engine, EngineOptions, process_group
from gapfx.runtime.launch import single_process_environment

Batch = tuple[Tensor, Tensor]


@pytest.fixture(scope="module", autouse=True)
def in_process_group() -> Iterator[None]:
    if not torch.distributed.is_initialized():
        single_process_environment()
    with process_group():
        yield


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


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
def test_fp32_steps_equal_plain_torch(factory: Any, clip: float) -> None:
    engine = Engine(make_model(), factory, EngineOptions(4, accumulation=2, clip=clip))
    run(engine, batches(6))
    assert largest_difference(engine.weights(), plain_weights(factory, 6, clip)) <= 1e-6
    engine.close()


def test_bf16_keeps_exact_fp32_masters() -> None:
    model = make_model()
    before = {fqn: p.detach().clone() for fqn, p in model.named_parameters()}
    engine = Engine(model, adamw, EngineOptions(4, dtype="bf16"))
    assert next(engine.module.parameters()).dtype is torch.bfloat16
    assert largest_difference(engine.weights(), before) == 0
    engine.close()


def test_bf16_steps_stay_near_fp32() -> None:
    engine = Engine(make_model(), momentum, EngineOptions(4, accumulation=2, dtype="bf16"))
    run(engine, batches(6))
    assert largest_difference(engine.weights(), plain_weights(momentum, 6, 1.0)) <= 5e-3
    engine.close()


@pytest.mark.parametrize("factory", [adamw, momentum])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_second_engine_continues_bit_for_bit(factory: Any, dtype: Any) -> None:
    options = EngineOptions(4, accumulation=2, dtype=dtype)
    whole = Engine(make_model(), factory, options)
    run(whole, batches(6))
    expected = whole.weights()
    whole.close()
    first = Engine(make_model(), factory, options)
    steps = list(batches(6))
    run(first, iter(steps[:3]))
    weights, state = first.weights(), first.optimizer_state()
    first.close()
    model = make_model()
    model.load_state_dict(weights)
    second = Engine(model, factory, options)
    second.load_optimizer_state(state)
    run(second, iter(steps[3:]))
    assert largest_difference(second.weights(), expected) == 0
    second.close()


def test_frozen_parameters_keep_their_values() -> None:
    model = make_model()
    frozen = next(iter(model.parameters())).requires_grad_(False)
    before = frozen.detach().clone()
    engine = Engine(model, adamw, EngineOptions(4, accumulation=2))
    run(engine, batches(2))
    assert torch.equal(engine.weights()["0.weight"], before)
    engine.close()


def test_closed_engines_leave_nothing_alive() -> None:
    import deepspeed

    for _ in range(4):
        engine = Engine(make_model(), adamw, EngineOptions(4, accumulation=2))
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
        Engine(make_model(), wrong, EngineOptions(4))
