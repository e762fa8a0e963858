"""Names of extensions: one owner each, and help for a wrong one."""

from __future__ import annotations

import pytest

from gapfx.errors import UserError
from gapfx.registry import Registry


def first() -> None: ...


def second() -> None: ...


def test_entries_keep_the_order_of_registration() -> None:
    registry: Registry[object] = Registry("colour")
    assert registry.register("red")(first) is first
    registry.add("amber", second)
    assert list(registry) == ["red", "amber"]
    assert registry["red"] is first
    assert "amber" in registry
    assert "green" not in registry


def test_a_name_belongs_to_one_owner_and_the_error_names_both() -> None:
    registry: Registry[object] = Registry("colour")
    registry.add("red", first)
    with pytest.raises(UserError) as caught:
        registry.register("red")(second)
    assert f"two colour entries are called 'red': {__name__}.first and {__name__}.second" in str(caught.value)
    assert registry["red"] is first


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rad", "unknown colour 'rad'\n  to do: did you mean 'red'? known: red, amber"),
        ("zzz", "unknown colour 'zzz'\n  to do: known: red, amber"),
        ("", "unknown colour ''\n  to do: known: red, amber"),
    ],
)
def test_an_unknown_name_lists_the_known_and_the_nearest(name: str, message: str) -> None:
    registry: Registry[object] = Registry("colour")
    registry.add("red", first)
    registry.add("amber", second)
    with pytest.raises(UserError) as caught:
        registry[name]
    assert str(caught.value) == message


def test_an_entry_without_a_name_of_its_own_is_shown_as_it_is() -> None:
    registry: Registry[object] = Registry("number")
    registry.add("one", 1)
    with pytest.raises(UserError, match=r"builtins?\.?|\?\.1"):
        registry.add("one", 2)
