"""Every error that gapfx raises on purpose, and the exit code that each one means."""

from __future__ import annotations

from typing import ClassVar


class GapfxError(Exception):
    """A failure of gapfx itself: exit code 1."""

    exit_code: ClassVar[int] = 1


class PassError(GapfxError):
    """A compiler pass failed; the message names it and the passes that ran before it."""


class AuditError(GapfxError):
    """An invariant of the run does not hold (masks differ between ranks, a pruned weight is not zero)."""


class UserError(GapfxError):
    """Something the user can put right: exit code 2, one message, no traceback.

    The message has up to three lines: what is wrong, where it is, what to do.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        lines = [what, f"  where: {where}" if where else "", f"  to do: {fix}" if fix else ""]
        super().__init__("\n".join(line for line in lines if line))


class TaskError(UserError):
    """The task file, its functions or its data cannot be used."""


class CaptureError(UserError):
    """The model's forward cannot be recorded."""


class PlanError(UserError):
    """A plan is malformed, or belongs to another model."""


class FileError(UserError):
    """A file of a model is damaged, or is none."""


class CheckpointError(UserError):
    """No usable checkpoint, or a checkpoint of another run."""


class DivergedError(UserError):
    """The loss is NaN or infinite; the run can be resumed from its newest checkpoint."""


class Interrupted(GapfxError):
    """The user stopped the run; it can be resumed: exit code 130."""

    exit_code: ClassVar[int] = 130
