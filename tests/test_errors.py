"""Messages of three lines, and the exit code of each error."""

from __future__ import annotations

import pytest

from gapfx import errors
from gapfx.errors import GapfxError, UserError


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("it is wrong"), "it is wrong"),
        (UserError("it is wrong", where="line 3"), "it is wrong\n  where: line 3"),
        (UserError("it is wrong", fix="mend it"), "it is wrong\n  to do: mend it"),
        (UserError("it is wrong", where="line 3", fix="mend it"), "it is wrong\n  where: line 3\n  to do: mend it"),
    ],
)
def test_a_message_says_what_where_and_what_to_do(error: UserError, message: str) -> None:
    assert str(error) == message
    assert error.what == "it is wrong"


@pytest.mark.parametrize(
    ("names", "exit_code"),
    [
        ("GapfxError PassError AuditError", 1),
        ("UserError TaskError CaptureError PlanError FileError CheckpointError DivergedError", 2),
        ("Interrupted", 130),
    ],
)
def test_every_error_has_its_exit_code(names: str, exit_code: int) -> None:
    assert {getattr(errors, name).exit_code for name in names.split()} == {exit_code}


def test_the_exit_codes_above_are_of_all_errors() -> None:
    found = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, GapfxError)}
    assert len(found) == 3 + 7 + 1


def test_an_interrupt_is_not_the_users_mistake() -> None:
    assert not issubclass(errors.Interrupted, UserError)
    assert not issubclass(errors.AuditError, UserError)
