"""Every example at smoke size, as a user would run it."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.made_up_pairs import write_pairs
from tests.runs import ROOT, gapfx, summary

SMOKE = {
    "custom_method": ("--phase-epochs", 0.02, "--finetune-epochs", 0.02, "--rounds", 1),
    "detection": ("--phase-epochs", 0.05, "--finetune-epochs", 0.05),
    "fashion": ("--phase-epochs", 0.02, "--finetune-epochs", 0.02, "--rounds", 1),
    "imagenet": (
        *("--phase-epochs", 0.5, "--finetune-epochs", 0.5, "--rounds", 1),
        *("--batch-size", 4, "--micro-batch", 4, "--no-calibrate"),
    ),
    "parts": ("--phase-epochs", 0.1, "--finetune-epochs", 0.1, "--rounds", 1),
    "sentences": ("--phase-epochs", 0.1, "--finetune-epochs", 0.1),
    "text": ("--phase-epochs", 0.01, "--finetune-epochs", 0.01, "--rounds", 1),
    "translation": ("--phase-epochs", 0.5, "--finetune-epochs", 0.5, "--rounds", 1),
}


# `large` is for plans alone; the others bring a loop of their own, see test_example_loops.py.
OTHERS = {"large", "plain_loop", "accelerate_loop", "lightning_loop"}
TRAINED = [path for path in sorted((ROOT / "examples").glob("*.py")) if path.stem not in OTHERS]


@pytest.fixture(autouse=True)
def _made_up_data(  # pyright: ignore[reportUnusedFunction]
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """For the examples whose data does not come with the repository."""
    monkeypatch.setenv("TRANSLATION_DIR", str(write_pairs(tmp_path / "pairs")))
    make_image_folder(tmp_path / "images")
    monkeypatch.setenv("IMAGENET_DIR", str(tmp_path / "images"))
    monkeypatch.setenv("IMAGENET_SIDE", "32")


def make_image_folder(folder: Path) -> None:
    """Noise in two classes, in the layout of ImageNet."""
    rng = np.random.default_rng(0)
    for split, name in itertools.product(("train", "val"), ("cat", "dog")):
        (folder / split / name).mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / name / f"{number}.JPEG")


@pytest.mark.slow
@pytest.mark.parametrize(("entry", "numel"), [("model", "401,646,551,040"), ("deepseek", "669,172,039,680")])
def test_models_of_hundreds_of_billions_of_weights_are_planned_without_a_weight(
    entry: str, numel: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--entry", entry, "--meta", "--zero", 3, "--dtype", "bf16", "--ranks", "64,1024", "--memory", "80GiB")
    assert gapfx("plan", ROOT / "examples" / "large.py", *flags) == 0
    told = capsys.readouterr().out
    assert numel in told
    assert "model state of a rank of 64, ZeRO 3:" in told


@pytest.mark.slow
def test_a_llama_of_hugging_face_trains_on_the_text(tmp_path: Path) -> None:
    flags = ("--entry", "llama", *SMOKE["text"])
    assert gapfx("sparsify", ROOT / "examples" / "text.py", "--out", tmp_path / "run", *flags) == 0
    facts = summary(tmp_path / "run")
    assert [group["name"] for group in facts["groups"]] == [f"model.layers.{index}" for index in range(4)]
    assert len(facts["per_weight"]) == 4 * 7
    assert facts["sparsity_actual"] == pytest.approx(0.8, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_an_example_trains_and_ends_at_its_sparsity(path: Path, tmp_path: Path) -> None:
    assert gapfx("sparsify", path, "--out", tmp_path / "run", *SMOKE[path.stem]) == 0
    facts = summary(tmp_path / "run")
    assert facts["sparsity_actual"] == pytest.approx(facts["sparsity_target"], abs=1e-3)
    for weight in facts["per_weight"].values():
        assert abs(weight["numel"] * (1 - facts["sparsity_target"]) - weight["kept"]) <= 1
    assert facts["metrics"]["final"]
