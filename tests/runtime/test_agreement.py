"""What ranks that train different replicas tell of each other."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gapfx.errors import DivergedError
from gapfx.runtime import steps


def peers(size: int, of_others: list[float]) -> Any:
    """Ranks of which the others give these facts together."""
    total: Callable[[Tensor], Tensor] = lambda facts: facts + torch.tensor(of_others, dtype=facts.dtype)  # noqa: E731
    return SimpleNamespace(size=size, total=total)


def agree(monkeypatch: pytest.MonkeyPatch, loss: float, *, of_other_team: list[float]) -> tuple[float, bool, bool]:
    team: Any = SimpleNamespace(peers=peers(1, [0.0, 0.0, 0.0, 0.0]), count=2)
    monkeypatch.setattr(steps.Peers, "all", lambda: peers(2, of_other_team))
    return steps._agree(team, loss, False, 7, steps.LONG_STEP_SECONDS)  # pyright: ignore[reportPrivateUsage]


def test_the_loss_that_is_told_is_the_mean_of_the_own_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    assert agree(monkeypatch, 0.5, of_other_team=[9.0, 0.0, 0.0, 1.0]) == (0.5, False, False)


def test_a_stop_of_another_replica_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    assert agree(monkeypatch, 0.5, of_other_team=[9.0, 1.0, 0.0, 1.0]) == (0.5, True, False)


def test_steps_are_long_on_the_mean_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds, is_long in ((steps.LONG_STEP_SECONDS, False), (steps.LONG_STEP_SECONDS + 0.1, True)):
        assert agree(monkeypatch, 0.5, of_other_team=[0.5, 0.0, 0.0, seconds])[2] == is_long


@pytest.mark.parametrize(
    ("own", "other", "message"),
    [
        (0.5, float("nan"), "the loss of another replica is nan at step 7"),
        (0.5, float("inf"), "the loss of another replica is inf at step 7, or a gradient is"),
        (float("nan"), 0.5, "the loss is nan at step 7"),
    ],
)
def test_a_loss_that_is_not_finite_ends_all_and_is_told_as_whose_it_is(
    own: float, other: float, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_other = other != other or other == float("inf")
    with pytest.raises(DivergedError, match=message):
        agree(monkeypatch, own, of_other_team=[other, 0.0, float(is_other), 1.0])
