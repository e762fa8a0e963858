"""The examples that bring a loop of their own: zeros hold exactly, and go on from checkpoints with masks alone."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gapfx.masks import unpack
from tests.runs import ROOT
from tests.task_files import load

pytestmark = pytest.mark.slow

PLAIN = load("examples/plain_loop.py")


def ran(name: str, *flags: object, ranks: int = 1) -> tuple[int, str]:
    """Exit code of an example as a program, and what it said."""
    launch = ("-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--master-port=0", "--standalone")
    path = str(ROOT / "examples" / f"{name}.py")
    command = [sys.executable, *(launch if ranks > 1 else ()), path, *map(str, flags)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    return ended.returncode, ended.stdout + ended.stderr


def masks_of(state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {fqn: unpack(bits, weights[fqn].shape) for fqn, bits in state["bits"].items()}


def assert_zeros_hold(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Exactly 0 where a mask drops, alive elsewhere."""
    assert masks
    for fqn, mask in masks.items():
        assert not weights[fqn][~mask].count_nonzero(), fqn
        assert int(weights[fqn][mask].count_nonzero()) > 0.9 * int(mask.sum()), fqn


@pytest.mark.parametrize("is_masked", [False, True], ids=["grow and prune", "mask"])
def test_a_plain_loop_holds_its_zeros(is_masked: bool) -> None:
    net, held = PLAIN.train(24, 0.9, is_masked=is_masked)
    assert held.sparsity == pytest.approx(0.9, abs=0.001)
    assert (held.phase, held.num_steps) == (0 if is_masked else 4, 24)
    assert_zeros_hold({fqn: p.detach() for fqn, p in net.named_parameters()}, held.masks)


def test_the_plain_loop_prints_sparsity_and_accuracy() -> None:
    code, told = ran("plain_loop", "--steps", 12, "--sparsity", 0.8)
    assert code == 0, told
    assert re.search(r"^sparsity 0\.800, accuracy 0\.\d{3}$", told, flags=re.MULTILINE)


def accelerated(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Weights and masks in a checkpoint of Accelerate, and its steps; momenta are 0 where masks drop."""
    weights = load_file(folder / "model.safetensors")
    state = torch.load(folder / "custom_checkpoint_0.pkl", weights_only=True)
    masks = masks_of(state, weights)
    momenta = torch.load(folder / "optimizer.bin", weights_only=True)["state"]
    for index, fqn in enumerate(PLAIN.fashion.model().state_dict()):
        if fqn in masks:
            assert not momenta[index]["momentum_buffer"][~masks[fqn]].count_nonzero()
    return weights, masks, state["num_steps"]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.distributed)])
def test_accelerate_holds_zeros_and_goes_on_with_masks_and_not_without(ranks: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, told = ran("accelerate_loop", "--out", out, "--steps", 8, ranks=ranks)
    assert code == 0, told
    assert re.search(r"^sparsity 0\.\d{3}, accuracy 0\.\d{3}$", told, flags=re.MULTILINE)
    weights, masks, steps = accelerated(out)
    assert steps == 8
    assert_zeros_hold(weights, masks)
    code, told = ran("accelerate_loop", "--out", out, "--steps", 12, "--resume", ranks=ranks)
    assert code == 0, told
    assert "goes on from step 8, " in told
    weights, after, steps = accelerated(out)
    assert steps == 12
    assert all(torch.equal(after[fqn], mask) for fqn, mask in masks.items())
    assert_zeros_hold(weights, after)
    (out / "custom_checkpoint_0.pkl").unlink()
    code, told = ran("accelerate_loop", "--out", out, "--steps", 16, "--resume", ranks=ranks)
    assert code == 1
    assert "Found checkpoints: 0" in told


def lit(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and masks in a checkpoint of Lightning."""
    found = torch.load(path, weights_only=True)
    weights = {fqn.removeprefix("net."): value for fqn, value in found["state_dict"].items()}
    return weights, masks_of(found["gapfx"], weights)


def test_lightning_holds_zeros_and_goes_on_with_masks_and_not_without(tmp_path: Path) -> None:
    code, told = ran("lightning_loop", "--out", tmp_path, "--steps", 8)
    assert code == 0, told
    weights, masks = lit(tmp_path / "last.ckpt")
    assert_zeros_hold(weights, masks)
    code, told = ran("lightning_loop", "--out", tmp_path, "--steps", 12, "--resume")
    assert code == 0, told
    assert re.search(r"^step 12: sparsity 0\.\d{3}, accuracy 0\.\d{3}$", told, flags=re.MULTILINE)
    weights, after = lit(tmp_path / "last.ckpt")
    assert all(torch.equal(after[fqn], mask) for fqn, mask in masks.items())
    assert_zeros_hold(weights, after)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    del checkpoint["gapfx"]
    torch.save(checkpoint, tmp_path / "last.ckpt")
    code, told = ran("lightning_loop", "--out", tmp_path, "--steps", 16, "--resume")
    assert code == 1
    assert "the checkpoint has no masks, so its zeros would fill up" in told
