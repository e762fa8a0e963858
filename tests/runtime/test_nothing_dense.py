"""Attention, recurrent layers and lookups under ZeRO: no dense weight waits for the backward; results are the same."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gapfx.ops.recompute import Recipe
from gapfx.plan import Plan
from gapfx.runtime.engine import Engine
from tests.runs import TASK, assert_same_bits, finish, gapfx, summary, weights
from tests.runtime.cut_all import CUT_ALL

SEQUENCES = TASK.with_name("sequences.py")


def dense_weights() -> list[torch.UntypedStorage]:
    """Those that were made of live values and are still there."""
    gc.collect()
    items = gc.get_objects()
    return [item for item in items if type(item) is torch.UntypedStorage and hasattr(item, "gapfx_recipe")]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_no_dense_weight_waits_for_the_backward(zero: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, alive = Engine._forward, list[int]()  # pyright: ignore[reportPrivateUsage]

    def watched(engine: Engine, batch: Any, loss: Any) -> object:
        out = forward(engine, batch, loss)
        alive.append(len(dense_weights()))
        return out

    monkeypatch.setattr(Engine, "_forward", watched)
    assert gapfx("sparsify", SEQUENCES, "--out", tmp_path / "run", "--zero", zero) == 0
    assert alive == [0] * Plan.load(tmp_path / "run" / "plan.json").num_steps
    planned = summary(tmp_path / "run")["per_weight"]
    assert {"tokens.weight", "attention.in_proj_weight", "lstm.weight_ih_l0"} <= set(planned)


def test_no_live_values_wait_for_the_backward_at_stage_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights that attention and recurrent layers read; each is gathered again."""
    cut = tmp_path / "cut.json"
    cut.write_text(json.dumps({"zero_optimization": CUT_ALL}))
    forward, waiting = Engine._forward, list[tuple[int, int]]()  # pyright: ignore[reportPrivateUsage]

    def watched(engine: Engine, batch: Any, loss: Any) -> object:
        out = forward(engine, batch, loss)
        gc.collect()
        recipes = [item for item in gc.get_objects() if type(item) is Recipe]
        waiting.append((len(recipes), sum(recipe.values.numel() + recipe.bits.numel() for recipe in recipes)))
        return out

    monkeypatch.setattr(Engine, "_forward", watched)
    flags = ("--zero", 3, "--deepspeed", cut, "--kernels", "expand")
    assert gapfx("sparsify", SEQUENCES, "--out", tmp_path / "run", *flags) == 0
    assert max(number for number, _ in waiting) > 0
    assert {size for _, size in waiting} == {0}


@pytest.mark.distributed
@pytest.mark.parametrize("zero", [1, 3])
def test_two_ranks_end_as_the_masked_run(zero: int, tmp_path: Path) -> None:
    for form in ("masked", "compact"):
        flags = ("--nproc", 2, "--zero", zero, "--clip", 0, "--form", form)
        code, _, err = finish("sparsify", SEQUENCES, "--out", tmp_path / form, *flags)
        assert code == 0, err
    # MKL's sums in an LSTM depend on where its operands lie in memory.
    ours, theirs = weights(tmp_path / "compact"), weights(tmp_path / "masked")
    for fqn, value in theirs.items():
        torch.testing.assert_close(ours[fqn], value, rtol=0, atol=1e-5)
        assert torch.equal(ours[fqn] == 0, value == 0)


@pytest.mark.parametrize(("zero", "entry"), [(0, "model"), (1, "model"), (2, "model"), (3, "model"), (3, "reentrant")])
def test_blocks_that_are_recomputed_end_in_the_same_bits(zero: int, entry: str, tmp_path: Path) -> None:
    for task in (TASK, f"{TASK.with_name('recomputed.py')}:{entry}"):
        flags = ("--out", tmp_path / ("kept" if task == TASK else "recomputed"), "--zero", zero)
        assert gapfx("sparsify", task, *flags, "--rounds", 1, "--micro-batch", 8) == 0
    assert_same_bits(tmp_path / "kept", tmp_path / "recomputed")
