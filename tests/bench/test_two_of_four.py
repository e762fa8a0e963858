"""Which 2:4 weights are timed on which device, and the timing itself on CUDA."""

from __future__ import annotations

import pytest
import torch

from gapfx.bench.clock import Stopwatch
from gapfx.bench.two_of_four import forwards, refusal, time_two_of_four
from gapfx.plan import Weight


@pytest.mark.parametrize(
    ("patterns", "capability", "reason"),
    [
        ({"2:4"}, None, "2:4 is for CUDA devices: not timed"),
        ({"unstructured"}, (9, 0), "2:4: not timed, no weight of the plan has it; give --pattern 2:4"),
        ({"2:4"}, (7, 5), "2:4 needs compute capability 8.0, this device has 7.5: not timed"),
        ({"2:4", "unstructured"}, (8, 0), ""),
        ({"2:4"}, (12, 0), ""),
    ],
)
def test_why_it_is_not_timed(patterns: set[str], capability: tuple[int, int] | None, reason: str) -> None:
    assert refusal(patterns, capability) == reason


def test_classes_that_the_format_does_not_take_are_told_and_other_patterns_left_out() -> None:
    weights = [Weight("a", (10, 8), 0.5, "2:4"), Weight("b", (10, 8), 0.5, "2:4"), Weight("c", (64, 64), 0.5)]
    watch = Stopwatch(60)
    time_two_of_four(weights, watch, (64,), 1.0)
    [timing] = watch.timings
    assert (timing.subject, timing.way) == ("linear 10x8 (2 of them)", "2:4")
    assert "multiples of 32" in timing.reason


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_semi_structured_product_is_the_dense_one(dtype: str) -> None:
    for tokens in (1, 64, 512):
        runs = forwards((128, 256), tokens, dtype)
        dense, sparse = runs["dense"](), runs["2:4"]()
        assert isinstance(dense, torch.Tensor)
        torch.testing.assert_close(sparse, dense, rtol=2e-2, atol=0.2)


@pytest.mark.gpu
def test_both_are_timed_in_both_dtypes() -> None:
    watch = Stopwatch(60)
    time_two_of_four([Weight("a", (128, 256), 0.5, "2:4")], watch, (64,), 1.0)
    assert {timing.subject for timing in watch.timings} == {
        f"linear 128x256 (1 of them) in {d}" for d in ("bf16", "fp16")
    }
    assert {timing.way for timing in watch.timings if timing.seconds} == {"dense", "2:4"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about a torch that cannot")
def test_what_torch_cannot_make_is_told() -> None:
    watch = Stopwatch(60)
    time_two_of_four([Weight("a", (64, 64), 0.5, "2:4")], watch, (8,), 1.0)
    assert {timing.subject for timing in watch.timings} == {
        f"linear 64x64 (1 of them) in {d}" for d in ("bf16", "fp16")
    }
    assert all(timing.reason.startswith("torch refuses it: ") for timing in watch.timings)
