"""Globs over FQNs."""

import pytest

from gapfx.errors import UserError
from gapfx.globs import matches, select

FQNS = ("encoder.layers.0.fc1.weight", "encoder.layers.10.fc1.weight", "head.weight")


@pytest.mark.parametrize(
    ("glob", "indices"),
    [
        ("encoder.layers.0.fc1.weight", [0]),
        ("encoder.layers.0", [0]),
        ("encoder", [0, 1]),
        ("*.fc?.weight", [0, 1]),
        ("encoder.layers.1*", [1]),
        ("encoder.layers.[02-9]|head", [0, 2]),
        ("*", [0, 1, 2]),
    ],
)
def test_a_glob_takes_parameters_and_whole_modules(glob: str, indices: list[int]) -> None:
    assert [index for index, fqn in enumerate(FQNS) if matches(glob, fqn)] == indices
    assert select(glob, FQNS, option="dense") == tuple(FQNS[index] for index in indices)


@pytest.mark.parametrize("glob", ["enc", "fc1", "Head.weight", "layers.0"])
def test_a_glob_is_anchored_and_case_sensitive(glob: str) -> None:
    assert not any(matches(glob, fqn) for fqn in FQNS)


def test_a_glob_without_a_match_lists_near_names() -> None:
    with pytest.raises(UserError) as caught:
        select("encoder.layer.0", FQNS, option="dense of find-weights")
    assert str(caught.value).startswith("the glob 'encoder.layer.0' matches no weight\n  where: option dense of find-w")
    assert "near: encoder.layers.0" in str(caught.value)
