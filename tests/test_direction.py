"""Which metrics are better when they are lower."""

from __future__ import annotations

import pytest

from gapfx.direction import is_lower_better


@pytest.mark.parametrize(
    "name", ["loss", "val_loss", "log-loss", "top1_error", "PPL", "ppl/test", "wer", "bits_per_byte"]
)
def test_less_of_these_is_better(name: str) -> None:
    assert is_lower_better(name)


@pytest.mark.parametrize("name", ["accuracy", "top5", "ap", "bleu", "class_miou", "answer_f1", "power", "image_score"])
def test_more_of_these_is_better(name: str) -> None:
    assert not is_lower_better(name)
