"""Scores of weights."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from gapfx.criterion import CRITERIA, ByGradient, is_elementwise, is_ordinal


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_magnitude_scores_by_absolute_value_without_a_gradient() -> None:
    weight = torch.tensor([[-3.0, 1.0], [-0.0, 2.0]], requires_grad=True)
    score = CRITERIA["magnitude"](weight, draw(0))
    assert torch.equal(score, torch.tensor([[3.0, 1.0], [0.0, 2.0]]))
    assert not score.requires_grad


def test_magnitude_draws_no_random_number() -> None:
    generator = draw(0)
    before = generator.get_state()
    CRITERIA["magnitude"](torch.randn(5), generator)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (5, 7), (2, 3, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_scores_are_a_permutation(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    score = CRITERIA["random"](torch.zeros(shape, dtype=dtype), draw(3))
    assert score.shape == shape
    assert sorted(score.flatten().tolist()) == list(range(score.numel()))


def test_random_scores_come_from_the_generator_alone() -> None:
    weight = torch.randn(100)
    score = CRITERIA["random"](weight, draw(1))
    torch.manual_seed(5)
    assert torch.equal(CRITERIA["random"](-weight, draw(1)), score)
    assert not torch.equal(CRITERIA["random"](weight, draw(2)), score)


def test_a_criterion_of_a_gradient_scores_elements_and_lets_go_of_the_gradient() -> None:
    snip, gradient = CRITERIA["snip"], torch.tensor([2.0, -3.0, 0.0])
    assert isinstance(snip, ByGradient)
    given = snip.given(gradient)
    assert torch.equal(given(torch.tensor([1.0, 0.5, 9.0]), draw(0)), torch.tensor([2.0, 1.5, 0.0]))
    assert is_elementwise(given)
    assert not is_ordinal(given)
    held = weakref.ref(gradient)
    del given, gradient
    gc.collect()
    assert held() is None
