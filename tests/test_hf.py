"""Hugging Face: zeros hold under its Trainer, on one rank and on two, and checkpoints come back with their masks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import gapfx
from gapfx.errors import FileError, UserError
from gapfx.masks import pack
from tests.runs import ROOT

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "tests" / "hf_training.py"


def trained(folder: Path, *flags: str, ranks: int = 1) -> dict[str, Any]:
    """What a training of 20 steps, or as many as `--steps`, came to."""
    launch = ("-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--master-port=0", "--standalone")
    command = [sys.executable, *(launch if ranks > 1 else ()), str(SCRIPT), str(folder), *flags]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads((folder / "facts.json").read_text())


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.distributed)])
def test_zeros_hold_with_the_callback_and_fill_up_without_it(ranks: int, tmp_path: Path) -> None:
    held, plain = trained(tmp_path / "held", ranks=ranks), trained(tmp_path / "plain", "--plain", ranks=ranks)
    assert held["alive"] == 0
    assert plain["alive"] > 0.9 * plain["masked"]
    assert held["moved"] > 0


def test_the_callback_follows_a_plan(tmp_path: Path) -> None:
    facts = trained(tmp_path / "run", "--plan")
    assert facts["alive"] == 0
    assert facts["sparsity"] == pytest.approx(0.8, abs=0.01)


def test_a_training_goes_on_with_its_masks_and_not_without_them(tmp_path: Path) -> None:
    trained(tmp_path / "run")
    facts = trained(tmp_path / "run", "--resume", "--steps", "30")
    assert (facts["alive"], facts["steps"]) == (0, 30)
    for masks in (tmp_path / "run").glob("checkpoint-*/gapfx_masks.safetensors"):
        masks.unlink()
    with pytest.raises(AssertionError, match=r"has no gapfx_masks.safetensors, so its zeros would fill up"):
        trained(tmp_path / "run", "--resume", "--steps", "40")


def tiny_llama() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    return transformers.LlamaForCausalLM(config)


def test_a_checkpoint_comes_back_with_its_masks(tmp_path: Path) -> None:
    from gapfx.hf import from_pretrained, save_pretrained

    model = tiny_llama()
    masks = {fqn: torch.rand_like(p) < 0.2 for fqn, p in model.named_parameters() if "proj" in fqn}
    save_pretrained(model, tmp_path / "model", masks)
    back, found = from_pretrained(tmp_path / "model", transformers.AutoModelForCausalLM)
    assert found.keys() == masks.keys()
    assert all(torch.equal(found[fqn], mask) for fqn, mask in masks.items())
    ours, theirs = model.state_dict(), back.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    tiny_llama().save_pretrained(tmp_path / "model")
    with pytest.raises(FileError, match="are not 0 where its mask drops"):
        from_pretrained(tmp_path / "model", transformers.AutoModelForCausalLM)
    (tmp_path / "model" / "gapfx_masks.safetensors").unlink()
    with pytest.raises(FileError, match=r"has no gapfx_masks.safetensors"):
        from_pretrained(tmp_path / "model", transformers.AutoModelForCausalLM)


def test_a_trainer_with_deepspeed_is_refused() -> None:
    from types import SimpleNamespace

    from gapfx.hf import SparseCallback

    model = tiny_llama()
    callback = SparseCallback(masks={})
    arguments = SimpleNamespace(deepspeed="ds.json")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(UserError, match="masks cannot be held in a Trainer with DeepSpeed"):
        callback.on_train_begin(arguments, SimpleNamespace(global_step=0), None, model=model, optimizer=optimizer)


def test_a_training_that_follows_a_plan_goes_on_without_the_masks_of_its_start(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from gapfx.hf import SparseCallback, write_state

    model, tokens = tiny_llama(), (torch.randint(64, (1, 8)),)
    plan = gapfx.sparsify(tiny_llama(), tokens, sparsity=0.8, groups=2).plan
    plan = gapfx.with_schedule(plan, "gap", gapfx.Budget(1, 5, 10))
    dense = {w.fqn: pack(torch.ones(w.shape, dtype=torch.bool)) for w in plan.weights()}
    (tmp_path / "checkpoint-3").mkdir()
    write_state(tmp_path / "checkpoint-3", {"version": 1, "num_steps": 3, "phase": 0, "bits": dense})
    before = {fqn: parameter.detach().clone() for fqn, parameter in model.named_parameters()}
    callback, optimizer = SparseCallback(plan=plan), torch.optim.SGD(model.parameters(), 0.1)
    arguments, at = SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(global_step=3)
    callback.on_train_begin(arguments, at, None, model=model, optimizer=optimizer)
    assert all(torch.equal(parameter, before[fqn]) for fqn, parameter in model.named_parameters())


def test_a_llama_becomes_a_sparse_file_and_comes_back(tmp_path: Path) -> None:
    model = tiny_llama()
    sparse = gapfx.sparsify(model, (torch.randint(64, (1, 8)),), sparsity=0.9, groups=2)
    gapfx.save_sparse(sparse.dense_state_dict(), tmp_path / "x.gapfx", plan=sparse.plan, masks=dict(sparse.masks))
    back = gapfx.load_sparse(tmp_path / "x.gapfx")
    assert all(torch.equal(back[key], value) for key, value in sparse.dense_state_dict().items())
