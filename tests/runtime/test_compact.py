"""Weights held by their live values alone: the same run as with masks, in less memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.runs import TASK, assert_same_bits, finish, gapfx, summary, weights

SCRIPTED = TASK.with_name("scripted_training.py")
UNCLIPPED = ("--clip", 0)


def run(out: Path, *flags: object, task: Path = TASK) -> Path:
    if "--nproc" in flags:
        code, _, err = finish("sparsify", task, "--out", out, *flags)
        assert code == 0, err
    else:
        assert gapfx("sparsify", task, "--out", out, *flags) == 0
    return out


def pair(folder: Path, *flags: object) -> tuple[Path, Path]:
    return run(folder / "masked", "--form", "masked", *flags), run(folder / "compact", "--form", "compact", *flags)


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--zero", 2, "--state", "reset"),
        ("--method", "static", "--pattern", "2:4"),
        ("--method", "oneshot", "--allocation", "erk"),
        ("--method", "dense"),
    ],
    ids=["gap", "zero 2, carried state", "static 2:4", "oneshot erk", "dense"],
)
def test_a_run_ends_in_the_bits_of_the_masked_run(flags: tuple[object, ...], tmp_path: Path) -> None:
    masked, compact = pair(tmp_path, *UNCLIPPED, *flags)
    assert_same_bits(masked, compact)
    assert summary(compact)["form"] == "compact"
    same = ("sparsity_actual", "sparsity_model", "per_weight", "metrics")
    assert {key: summary(compact)[key] for key in same} == {key: summary(masked)[key] for key in same}


def test_clipping_differs_by_the_order_of_a_sum_at_most(tmp_path: Path) -> None:
    masked, compact = map(weights, pair(tmp_path, "--clip", 0.2))
    assert max(float((masked[fqn] - compact[fqn]).abs().max()) for fqn in masked) < 1e-5


def test_in_bf16_the_runs_are_the_same(tmp_path: Path) -> None:
    assert_same_bits(*pair(tmp_path, *UNCLIPPED, "--dtype", "bf16"))


def test_a_checkpoint_holds_live_values_alone_in_either_form(tmp_path: Path) -> None:
    for made in pair(tmp_path):
        kept = {fqn: facts["kept"] for fqn, facts in summary(made)["per_weight"].items()}
        tensors = load_file(newest(made) / "rank-00000.safetensors")
        assert {fqn: tuple(tensors[f"weights/{fqn}"].shape) for fqn in kept} == {fqn: (n,) for fqn, n in kept.items()}
        assert {fqn: tensors[f"moment:exp_avg/{fqn}"].numel() for fqn in kept} == kept


@pytest.mark.parametrize("forms", [("masked", "compact"), ("compact", "masked")])
def test_a_checkpoint_continues_in_either_form(forms: tuple[str, str], tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", *UNCLIPPED)
    cut = run(tmp_path / "cut", *UNCLIPPED, "--form", forms[0])
    steps = sorted((cut / "checkpoints").glob("step-*"))
    for path in steps[1:]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    for name in ("model.safetensors", "summary.json", "report.html"):
        (cut / name).unlink()
    assert json.loads((steps[0] / "state.json").read_text())["step"] < 64
    run(cut, *UNCLIPPED, "--form", forms[1], "--resume")
    assert_same_bits(whole, cut)


def test_what_is_masked_in_place_stays_whole_and_ends_the_same(tmp_path: Path) -> None:
    runs = [run(tmp_path / form, "--form", form, *UNCLIPPED, task=SCRIPTED) for form in ("masked", "compact")]
    assert_same_bits(*runs)


@pytest.mark.distributed
def test_two_ranks_equal_those_of_the_masked_run(tmp_path: Path) -> None:
    assert_same_bits(*pair(tmp_path, *UNCLIPPED, "--nproc", 2))
