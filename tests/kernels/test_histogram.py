"""Native histograms of keys, and the exact threshold from them, against a stable sort."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gapfx.kernels import histogram
from gapfx.threshold import Keys, num_nan
from tests.kernels.needs import needs_kernels

pytestmark = needs_kernels
MANY = 300_007  # several threads, several copies of the counts
SIZES = (1, 2, 63, 64, 65, 1000, MANY)
KINDS = {
    "normal": lambda n: torch.randn(n),
    "with ties": lambda n: torch.randn(n).mul(3).round(),
    "all equal": lambda n: torch.full((n,), -2.5),
    "signed zeros": lambda n: torch.where(torch.rand(n) < 0.5, -0.0, 0.0),
    "infinite": lambda n: torch.randn(n).div(torch.randint(0, 2, (n,))).nan_to_num(0, float("inf"), -float("inf")),
    "denormal": lambda n: torch.randn(n) * 1e-42,
    "every magnitude": lambda n: torch.randn(n) * 10.0 ** torch.randint(-38, 38, (n,)),
    "bfloat16": lambda n: torch.randn(n).bfloat16(),
    "negative bfloat16": lambda n: -torch.rand(n).bfloat16() - 1,
    "int32": lambda n: torch.randint(-(2**31), 2**31, (n,)).to(torch.int32),
    "small int32": lambda n: torch.randint(-3, 3, (n,), dtype=torch.int32),
}


def highest(score: Tensor, num_kept: int) -> Tensor:
    """By a stable sort: among equal scores the lower flat index first."""
    order = score.double().sort(descending=True, stable=True).indices
    return torch.zeros_like(score, dtype=torch.bool).index_fill_(0, order[:num_kept], True)


def check(score: Tensor) -> None:
    assert histogram.can_take(score)
    for num_kept in {1, score.numel() // 10 + 1, score.numel() // 2 + 1, score.numel()}:
        keys = Keys.of(score)
        found = keys.threshold(num_kept)
        mask = keys.mark(found.key, num_kept - found.num_above)
        assert torch.equal(mask, highest(score, num_kept))
        assert found.num_tied >= num_kept - found.num_above


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("kind", KINDS)
def test_the_highest_are_those_of_a_stable_sort(kind: str) -> None:
    torch.manual_seed(0)
    for size in SIZES:
        check(KINDS[kind](size))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("threads", [2, 5])
def test_several_threads_select_the_same(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for kind in ("normal", "all equal", "bfloat16", "small int32"):
            check(KINDS[kind](MANY))
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("level")
def test_counts_are_those_of_the_halves_of_the_keys() -> None:
    torch.manual_seed(0)
    scores = torch.randint(-(2**31), 2**31, (MANY,)).to(torch.int32)
    keys = scores.long() + 2**31
    assert torch.equal(histogram.counts(scores), torch.bincount(keys >> 16, minlength=1 << 16))
    high = int(keys[0] >> 16)
    assert torch.equal(
        histogram.counts(scores, high), torch.bincount(keys[keys >> 16 == high] & 0xFFFF, minlength=65536)
    )


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_nan_is_found_and_nothing_else(dtype: torch.dtype) -> None:
    special = torch.tensor([float("inf"), -float("inf"), 0.0, -0.0, 1e-42, float("nan"), -float("nan")])
    assert num_nan(special.to(dtype).repeat(50)) == 100
    assert num_nan(torch.ones(64, dtype=torch.int32)) == 0


def test_a_mask_of_scores_in_another_order_has_their_flat_order() -> None:
    scores = torch.randn(30, 50).t()
    found = Keys.of(scores).threshold(100)
    mask = histogram.mark(scores, found.key, found.num_tied)
    assert torch.equal(mask.flatten(), highest(scores.flatten(), 100))


def test_no_scores_have_no_counts() -> None:
    assert int(histogram.counts(torch.empty(0)).sum()) == 0
    assert histogram.mark(torch.empty(0), 0, 1).numel() == 0
