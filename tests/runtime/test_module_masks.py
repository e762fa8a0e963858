"""Masks of a module that an engine trains: whole below ZeRO 3, cut over ranks like the values at it."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import gapfx
from gapfx.errors import AuditError
from gapfx.masks import bits_of, pack
from gapfx.plan import Plan
from gapfx.runtime.engine import EngineOptions
from gapfx.runtime.exchange import take_state
from gapfx.runtime.feed import Feed
from gapfx.runtime.loop import initial_state
from gapfx.runtime.module_masks import put_bits, whole_bits_of
from gapfx.runtime.skeleton import skeleton_of
from gapfx.runtime.steps import Job, PhaseRun, open_engine
from gapfx.runtime.teams import all_in_one_team
from gapfx.schedule import Budget, with_schedule
from tests.runtime.cut_all import CUT_ALL


def squares(model: nn.Module, batch: Any) -> Tensor:
    return model(torch.stack(batch)).square().mean()


def opened(zero: int, tmp_path: Path, kernel: str = "expand") -> tuple[Any, Any]:
    """An engine in the middle of a phase with everything sparse, and the state."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8))
    sparse = gapfx.sparsify(model, (torch.randn(2, 24),), sparsity=0.75, groups=2)
    groups = tuple(
        dataclasses.replace(
            group, weights=tuple(dataclasses.replace(w, kernel=cast(Any, kernel)) for w in group.weights)
        )
        for group in sparse.plan.groups
    )
    plan: Plan = with_schedule(dataclasses.replace(sparse.plan, groups=groups), "static", Budget(1, 2, 2))
    data = [torch.randn(24) for _ in range(8)]
    job = Job(
        plan=plan,
        module=model,
        feed=Feed(data=data, micro_batch=4, accumulation=1, world_size=1, rank=0, seed=0, collate=list),
        loss=squares,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
        engine=EngineOptions(
            4, zero_stage=zero, is_live=True, deepspeed={"zero_optimization": CUT_ALL} if zero == 3 else {}
        ),
        checkpoints=tmp_path,
        live=frozenset(weight.fqn for weight in plan.weights()),
    )
    skeleton, state = skeleton_of(model), initial_state(job)
    return open_engine(PhaseRun(job, skeleton, 0, plan.phases[0], time.monotonic(), all_in_one_team()), state), state


@pytest.mark.usefixtures("in_process_group")
@pytest.mark.parametrize("zero", [1, 3])
def test_a_mask_is_a_parameter_that_is_cut_at_stage_3_alone(zero: int, tmp_path: Path) -> None:
    engine, state = opened(zero, tmp_path)
    for fqn, bits in state.bits.items():
        held = bits_of(engine.module, fqn)
        assert isinstance(held, nn.Parameter) == hasattr(held, "ds_tensor") == (zero == 3)
        assert (held.numel() == 0) == (zero == 3), "nothing is gathered between steps"
        assert fqn in engine.trained
        with whole_bits_of(engine.module, fqn) as whole:
            assert torch.equal(whole, bits)
    assert all(parameter.dtype is torch.float32 for parameter in engine.trained.values())
    engine.close()


@pytest.mark.usefixtures("in_process_group")
def test_masks_of_weights_whose_zeros_are_skipped_stay_whole(tmp_path: Path) -> None:
    engine, state = opened(3, tmp_path, kernel="sparse")
    assert all(torch.equal(bits_of(engine.module, fqn), bits) for fqn, bits in state.bits.items())
    engine.close()


@pytest.mark.usefixtures("in_process_group")
@pytest.mark.parametrize("zero", [1, 3])
def test_a_mask_that_was_changed_in_the_model_is_found(zero: int, tmp_path: Path) -> None:
    engine, state = opened(zero, tmp_path)
    held: Any = bits_of(engine.module, "0.weight")
    (held.ds_tensor if zero == 3 else held).copy_(pack(torch.ones(32 * 24, dtype=torch.bool)))
    with pytest.raises(AuditError, match=r"^the mask of 0.weight was changed in the model on rank 0 at step 0"):
        take_state(engine, state, is_last=True)
    engine.close()


def test_a_layer_that_stands_in_a_list_many_times_is_masked_once(tmp_path: Path) -> None:
    """As in ALBERT: the module has three names, and so has its weight."""
    torch.manual_seed(0)
    layer = nn.Linear(24, 24)
    sparse = gapfx.sparsify(nn.Sequential(*[layer] * 3), (torch.randn(2, 24),), sparsity=0.75, groups=1)
    (weight,) = sparse.plan.weights()
    assert weight.aliases == ("1.weight", "2.weight")
    bits = pack(torch.rand(24, 24) > 0.5)
    put_bits(sparse.module, weight, bits, None)
    assert torch.equal(bits_of(sparse.module, "0.weight"), bits)
