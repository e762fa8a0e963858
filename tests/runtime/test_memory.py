"""Which freed blocks a training gives back."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from gapfx.plan import Group, Plan, Weight
from gapfx.runtime import memory
from gapfx.runtime.memory import keep_activations_alone, largest_activation

MIB = 2**20


def plan_of(*weights: tuple[tuple[int, ...], int]) -> Plan:
    made = (Weight(f"{i}.weight", shape, 0.9, positions=positions) for i, (shape, positions) in enumerate(weights))
    return Plan((Group("all", tuple(made)),))


@pytest.fixture(autouse=True)
def as_before() -> Generator[None]:
    before = memory._steps.threshold  # pyright: ignore[reportPrivateUsage]
    yield
    memory._steps.threshold = before  # pyright: ignore[reportPrivateUsage]


def test_the_largest_activation_is_that_of_the_widest_side_at_most_positions() -> None:
    plan = plan_of(((3072, 768), 128), ((768, 3072), 100), ((64, 256, 3, 3), 1000), ((10, 10), 0))
    assert largest_activation(plan, 4) == 128 * 3072 * 4
    assert largest_activation(plan, 2) == 128 * 3072 * 2
    assert largest_activation(plan_of(((10, 10), 0)), 4) == 0


@pytest.mark.parametrize(
    ("activation", "kept"),
    [(0, 32 * MIB), (1, 2 * MIB), (3 * MIB // 2, 6 * MIB), (9 * MIB, 32 * MIB)],
    ids=["unknown", "small", "of a GPT", "of a convolution"],
)
def test_blocks_much_larger_than_an_activation_are_given_back(activation: int, kept: int) -> None:
    keep_activations_alone(activation)
    assert memory._steps.threshold == kept  # pyright: ignore[reportPrivateUsage]
