"""Shares of a total sparsity."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gapfx.allocation import erk, one_threshold
from gapfx.errors import UserError

SHAPES = {"conv1": (64, 3, 7, 7), "conv2": (64, 64, 3, 3), "wide": (512, 512, 3, 3), "fc": (1000, 512)}


def total(shares: dict[str, float], numel: dict[str, int]) -> float:
    return sum(shares[fqn] * numel[fqn] for fqn in shares) / sum(numel.values())


def test_erk_densities_go_with_the_sum_of_the_shape_over_its_product() -> None:
    shares = erk(SHAPES, 0.99)
    density = {fqn: 1 - share for fqn, share in shares.items()}
    score = {fqn: sum(shape) / math.prod(shape) for fqn, shape in SHAPES.items()}
    ratio = density["fc"] / score["fc"]
    assert {fqn: density[fqn] / score[fqn] for fqn in SHAPES} == pytest.approx(dict.fromkeys(SHAPES, ratio))


def test_erk_keeps_weights_dense_whose_density_would_pass_one() -> None:
    shares = erk(SHAPES, 0.8)
    assert shares["conv1"] == 0
    assert 0 < shares["conv2"] < shares["wide"] < 1


@given(
    st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=4), min_size=1, max_size=6),
    st.floats(0, 0.99),
)
def test_erk_meets_the_target_exactly(shapes: list[list[int]], sparsity: float) -> None:
    named = {str(index): tuple(shape) for index, shape in enumerate(shapes)}
    shares = erk(named, sparsity)
    assert total(shares, {fqn: math.prod(shape) for fqn, shape in named.items()}) == pytest.approx(sparsity, abs=1e-9)
    assert all(-1e-9 <= share < 1 for share in shares.values())


def test_one_threshold_prunes_the_smallest_of_all_weights() -> None:
    tensors = {"small": torch.tensor([[0.1, -0.2], [0.3, 9.0]]), "large": torch.tensor([[-4.0, 5.0, 6.0, 7.0]])}
    assert one_threshold(tensors, 0.5) == {"small": 0.75, "large": 0.25}


def test_one_threshold_never_empties_a_weight() -> None:
    tensors = {"small": torch.full((2, 5), 1e-6), "large": torch.randn(10, 10)}
    shares = one_threshold(tensors, 0.9)
    assert shares["small"] == 0.9
    assert total(shares, {"small": 10, "large": 100}) == pytest.approx(0.9)


def test_one_threshold_counts_exactly_with_ties() -> None:
    shares = one_threshold({"a": torch.ones(4, 4), "b": torch.ones(2, 4)}, 0.5)
    assert total(shares, {"a": 16, "b": 8}) == 0.5


def test_one_threshold_at_zero_sparsity_prunes_nothing() -> None:
    assert one_threshold({"a": torch.randn(3, 3)}, 0.0) == {"a": 0.0}


def test_one_threshold_needs_values() -> None:
    with pytest.raises(UserError, match="needs values, the model is on the meta device"):
        one_threshold({"a": torch.empty(3, 3, device="meta")}, 0.5)
