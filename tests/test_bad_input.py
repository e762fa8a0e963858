"""Every mistake of a user: one message that says what, where and what to do; exit code 2; nothing lost."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.runs import ROOT, TASK, gapfx

GOOD = TASK.read_text()
BROKEN = """

class Broken:
    def __len__(self) -> int:
        return 512

    def __getitem__(self, index: int) -> Batch:
        raise OSError(f"sample {index} is unreadable")
"""

# What is wrong: (edit of the task file, flags, what the message says).
TASK_MISTAKES = {
    "no model": (("def model(", "def modell("), (), "the task has no function model()"),
    "no loss": (("def loss(", "def lossy("), (), "the task has no function loss(model, batch)"),
    "data is a number": (("return TensorDataset(x, x[:, :4].argmax(1))", "return 42"), (), "which is not a dataset"),
    "data is a loader": (
        ("return TensorDataset(x, x[:, :4].argmax(1))", "return torch.utils.data.DataLoader(x)"),
        (),
        "returned a DataLoader",
    ),
    "model is no module": (("return Net()", "return 1"), (), "model() returned a int"),
    "loss is a vector": (("batch[1])\n", "batch[1], reduction='none')\n"), (), "loss(model, batch) returned a tensor"),
    "loss raises": (("F.cross_entropy(model(batch[0])", "F.cross_entropy(model(batch[9])"), (), "IndexError"),
    "a sample raises": (
        ("return TensorDataset(x, x[:, :4].argmax(1))", "return Broken()"),
        (),
        "reading the data failed",
    ),
    "loss is NaN": (("batch[1])\n", "batch[1]) * float('nan')\n"), (), "the loss is nan at step 1"),
    "syntax error": (("def model()", "def model(:"), (), "the task file cannot be imported"),
    "unknown default": (('"sparsity": 0.8', '"sparsty": 0.8'), (), "did you mean 'sparsity'?"),
    "evaluate gives text": (('return {"accuracy"', 'return "good" or {"accuracy"'), (), "evaluate() returned 'good'"),
    "no such metric type": (("float(torch.cat(hits).mean())", "'high'"), (), "evaluate() returned"),
    "nothing to prune": (("return Net()", "return nn.Embedding(4, 4)"), (), "the task"),
}
FLAG_MISTAKES = {
    "sparsity above 1": (("--sparsity", 1.2), "sparsity 1.2 is not in [0, 1)"),
    "unknown method": (("--method", "gapp"), "did you mean 'gap'? known: gap, rgap, pgap, dense,"),
    "gmp to a fixed pattern": (("--method", "gmp", "--pattern", "2:4"), "which cannot be reached step by step"),
    "no prune at all": (("--landing", 0), "landing is 0, it must be at least 1"),
    "landing with restarts": (("--landing", 2, "--state", "reset"), "needs one learning rate and one optimizer state"),
    "exchange of all": (("--exchange", 1), "exchange 1.0 is not in [0, 1)"),
    "exchange to a fixed pattern": (("--exchange", 0.3, "--pattern", "2:4"), "of which no share can be dropped"),
    "landing without growth": (("--method", "gmp", "--landing", 4), "the method gmp does not read --landing"),
    "warm-up of exchanged weights": (("--method", "rigl", "--regrow-warmup", 50), "is for gap, rgap, pgap, acdc"),
    "unknown partition": (("--partition", "blcks"), "expected one of blocks, params, stages, random, by-hand"),
    "unknown pattern": (("--pattern", "tartan"), "unknown pattern 'tartan'"),
    "auto pattern without kernels": (("--pattern", "auto", "--form", "masked"), "the pattern auto goes by the kernels"),
    "pattern keeps more than all": (("--pattern", "5:4"), "keeps 5 of 4"),
    "too many groups": (("--groups", 99), "99 groups"),
    "groups is a word": (("--groups", "some"), "groups is 'some', expected a whole number or auto"),
    "glob without a match": (("--dense", "nope*"), "the glob 'nope*' matches no weight"),
    "batch above the data": (("--batch-size", 1000), "give a --batch-size of at most 512"),
    "batch not divisible": (("--batch-size", 32, "--micro-batch", 5), "is no multiple of micro-batches of 5"),
    "unknown dtype": (("--dtype", "fp8"), "dtype is 'fp8'"),
    "ZeRO stage": (("--zero", 4), "there is no ZeRO stage 4"),
    "bf16 at stage 0": (("--zero", 0, "--dtype", "bf16"), "bf16 at ZeRO stage 0 is not exact"),
    "no DeepSpeed file": (("--deepspeed", "nowhere.json"), "nowhere.json cannot be read"),
    "DeepSpeed file says otherwise": (
        ("--deepspeed", ROOT / "tests" / "tasks" / "deepspeed_stage_2.json"),
        "the DeepSpeed file says zero_optimization.stage 2, this run 1",
    ),
    "no rounds": (("--rounds", 0), "rounds is 0, it must be at least 1"),
    "plan without a file": (("--plan", "nowhere.json"), "the plan nowhere.json cannot be read"),
    "run to resume is not there": (("--resume",), "holds no run to continue"),
    "resume and force": (("--resume", "--force"), "exclude each other"),
    "unknown pass": (("--passes", "insert-maskz"), "unknown pass 'insert-maskz'"),
}


def assert_one_message(code: int, err: str, says: str) -> None:
    assert code == 2
    assert says in err
    assert err.startswith(("error: ", "Usage: "))
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) <= 4


@pytest.mark.parametrize("name", TASK_MISTAKES)
def test_mistakes_in_a_task_file_are_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (old, new), flags, says = TASK_MISTAKES[name]
    assert old in GOOD
    task = tmp_path / "task.py"
    task.write_text(GOOD.replace(old, new) + BROKEN)
    code = gapfx("sparsify", task, "--out", tmp_path / "run", *flags)
    assert_one_message(code, capsys.readouterr().err, says)


@pytest.mark.parametrize("name", FLAG_MISTAKES)
def test_mistaken_flags_are_named_and_leave_no_run(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, says = FLAG_MISTAKES[name]
    code = gapfx("sparsify", TASK, "--out", tmp_path / "run", *flags)
    assert_one_message(code, capsys.readouterr().err, says)
    assert not (tmp_path / "run").exists()


def test_an_unknown_flag_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert gapfx("sparsify", TASK, "--sparsty", 0.5) == 2
    assert "No such option: --sparsty" in capsys.readouterr().err


def test_a_missing_task_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert_one_message(gapfx("sparsify", "nowhere.py"), capsys.readouterr().err, "there is no task file nowhere.py")


def test_a_run_is_never_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    code = gapfx("sparsify", TASK, "--out", tmp_path)
    assert_one_message(code, capsys.readouterr().err, "already holds a run")
    assert (tmp_path / "config.json").read_text() == "{}"


def test_a_folder_that_is_no_run_survives_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    code = gapfx("sparsify", TASK, "--out", tmp_path, "--force")
    assert_one_message(code, capsys.readouterr().err, "exists and is not a run")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("fqn", "shape", "says"),
    [
        ("blocks.7.up.weight", [32, 16], "the plan is for another model: it has no parameter"),
        ("blocks.0.up.weight", [16, 32], "the plan is for another model: blocks.0.up.weight has shape [32, 16]"),
        ("norm.weight", [16], "norm.weight cannot be sparse"),
    ],
)
def test_a_plan_for_another_model_is_refused(
    fqn: str, shape: list[int], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gapfx("plan", TASK, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    every = [weight for group in plan["groups"] for weight in group["weights"]]
    next(weight for weight in every if weight["fqn"] == "blocks.0.up.weight").update(fqn=fqn, shape=shape)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    code = gapfx("sparsify", TASK, "--out", tmp_path / "run", "--plan", tmp_path / "plan.json")
    assert_one_message(code, capsys.readouterr().err, says)


def test_settings_of_a_run_do_not_change_on_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--out", tmp_path / "run", "--rounds", 1, "--phase-epochs", 0.1, "--finetune-epochs", 0.1)
    assert gapfx("sparsify", TASK, *flags) == 0
    before = (tmp_path / "run" / "summary.json").read_bytes()
    capsys.readouterr()
    code = gapfx("sparsify", TASK, *flags, "--resume", "--sparsity", 0.5)
    assert_one_message(code, capsys.readouterr().err, "the run was started with sparsity 0.8, not 0.5")
    assert (tmp_path / "run" / "summary.json").read_bytes() == before


def test_a_damaged_checkpoint_falls_back_and_none_left_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    flags = ("--out", run, "--rounds", 1, "--phase-epochs", 0.2, "--finetune-epochs", 0.2)
    assert gapfx("sparsify", TASK, *flags) == 0
    checkpoints = sorted((run / "checkpoints").iterdir())
    _flip_byte(checkpoints[-1] / "rank-00000.safetensors")
    capsys.readouterr()
    assert gapfx("sparsify", TASK, *flags, "--resume") == 0
    assert re.search(r"is damaged: .*SHA-256; continuing from step", capsys.readouterr().out.replace("\n", " "))
    for checkpoint in (run / "checkpoints").iterdir():
        _flip_byte(checkpoint / "rank-00000.safetensors")
    code = gapfx("sparsify", TASK, *flags, "--resume")
    assert_one_message(code, capsys.readouterr().err, "no checkpoint is whole")


def _flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("wrong", ['{"zero_optimization": {"reduce_bucket": 5}}', '{"bf16": true}'])
def test_a_configuration_that_deepspeed_refuses_is_told_before_anything_is_written(
    wrong: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(wrong)
    assert gapfx("sparsify", TASK, "--out", tmp_path / "run", "--deepspeed", path) == 2
    assert "error: DeepSpeed refuses the configuration: " in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_continued_with_another_model_or_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, task = tmp_path / "run", tmp_path / "task.py"
    norm = "self.norm = nn.GroupNorm(2, width)"
    task.write_text(GOOD)
    assert gapfx("sparsify", task, "--out", run, "--rounds", 1) == 0
    again = ("sparsify", task, "--out", run, "--rounds", 1, "--resume")
    capsys.readouterr()
    assert gapfx("plan", task, "--rounds", 1, "--json") == 0
    bare = tmp_path / "bare.json"
    bare.write_text(capsys.readouterr().out)
    for same in (run / "plan.json", bare):
        assert gapfx(*again, "--plan", same) == 0
    other = tmp_path / "other.json"
    other.write_text((run / "plan.json").read_text().replace("0.8", "0.5"))
    capsys.readouterr()
    assert_one_message(gapfx(*again, "--plan", other), capsys.readouterr().err, "the run has another plan than")
    for changed in (norm.replace("(2, width)", "(2, width, affine=False)"), f"{norm}; self.extra = nn.PReLU()"):
        task.write_text(GOOD.replace(norm, changed))
        assert_one_message(gapfx(*again), capsys.readouterr().err, "the checkpoint is of another model: ")
