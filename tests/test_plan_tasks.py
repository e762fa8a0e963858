"""What `gapfx plan` says of models that no trace shows whole: own autograd Functions, routing, ScriptModules."""

from __future__ import annotations

from pathlib import Path

import pytest

from gapfx.cli import main

TASKS = Path(__file__).parent / "tasks"
Capsys = pytest.CaptureFixture[str]


def lines_of_plan(name: str, capsys: Capsys) -> list[str]:
    assert main(["plan", str(TASKS / f"{name}.py")]) == 0
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_a_weight_in_an_autograd_function_is_planned_and_named(capsys: Capsys) -> None:
    lines = lines_of_plan("own_function", capsys)
    product = "the autograd Function Product uses"
    assert [line for line in lines if line.startswith("note")] == [
        f"note: 1: {product} 1.weight as an operand of mm, seen by the ops below it",
        f"note: 2: {product} 2.weight as an operand of mm, seen by the ops below it",
        "note: 3.weight: 6 live weights for 4 outputs, of which some may get none and stay constant; "
        "keep it dense (--dense last) or take --allocation erk",
    ]
    assert "added to activations by add: a position table or a bias 2 32 1.shift, 2.shift" in lines
    assert any(line.startswith("all 4 704 ") for line in lines)


def test_experts_that_the_batch_did_not_reach_are_planned_and_the_routing_is_named(capsys: Capsys) -> None:
    lines = lines_of_plan("routed", capsys)
    notes = [line for line in lines if line.startswith("note")]
    reached = "they are taken because modules of their class beside them were reached"
    assert notes[0].startswith("note: the model: this batch did not come to 10 weights (0.experts.0.up.weight, ")
    assert notes[0].endswith(reached)
    assert [note.partition(" (")[0] for note in notes[1:]] == [
        "note: 0: the path depends on values",
        "note: 1: the path depends on values",
        "note: 2.weight: 3 live weights for 4 outputs, of which some may get none and stay constant; keep it dense",
    ]
    assert any(line.startswith("all 19 2,144 ") for line in lines)


def test_the_weights_of_a_script_module_are_told_apart(capsys: Capsys) -> None:
    lines = lines_of_plan("scripted", capsys)
    assert "note: 1: a ScriptModule uses 1.0.weight as an operand of addmm, seen by the ops below it" in lines
    assert "the scale or bias of native_layer_norm 2 32 1.2.weight, 1.2.bias" in lines
    assert any(line.startswith("all 3 144 ") for line in lines)


def test_a_last_batch_that_is_too_small_to_train_on_is_not_asked_for(tmp_path: Path) -> None:
    task = tmp_path / "task.py"
    task.write_text(
        "import torch\nfrom torch import nn\n"
        "def model(): return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))\n"
        "def data(split): return [(torch.randn(4), i % 2) for i in range(9)]\n"
        "def loss(model, batch): return nn.functional.cross_entropy(model(batch[0]), batch[1])\n"
    )
    assert main(["plan", str(task), "--batch-size", "8", "--groups", "1"]) == 0


@pytest.mark.parametrize("micro_batch", [0, 4])
def test_operations_are_those_of_whole_steps_and_shared_by_the_ranks(
    micro_batch: int, tmp_path: Path, capsys: Capsys
) -> None:
    task = tmp_path / "task.py"
    task.write_text(
        "import torch\nfrom torch import nn\n"
        "def model(): return nn.Sequential(nn.Linear(50, 50, bias=False), nn.Linear(50, 50, bias=False))\n"
        "def data(split): return [torch.randn(50) for _ in range(32)]\n"
        "def loss(model, batch): return model(batch).square().mean()\n"
    )
    flags = "--method static --sparsity 0.5 --groups 2 --phase-epochs 2 --finetune-epochs 1 --no-calibrate --ranks 1,4"
    assert main(["plan", str(task), *flags.split(), "--batch-size", "16", "--micro-batch", str(micro_batch)]) == 0
    # Two products of 50 x 50 forward and twice as much backward, two operations each, for 16 samples of ten steps.
    assert (2 * 2500 * 3 * 2 * 16 * 10, 2 * 2500 * 3 * 2 * 16 * 10 / 4) == (4.8e6, 1.2e6)
    wanted = "4.80 M and 2.40 M on 1, 1.20 M and 600 k on 4 ranks"
    assert (
        f"operations of a rank's training, dense and counted for the sparse form: {wanted}" in capsys.readouterr().out
    )
