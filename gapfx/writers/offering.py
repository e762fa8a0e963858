"""The writers of a run: which there are, whether they can work here, and what becomes of those that fail."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gapfx.errors import UserError
from gapfx.plan import Plan
from gapfx.writers.points import Points, Reader, read_all
from gapfx.writers.writer import WRITERS, Opening, Writer

Event = dict[str, Any]


@WRITERS.register("tensorboard")
def tensorboard() -> type[Writer]:
    """Event files for TensorBoard."""
    try:
        from gapfx.writers.to_tensorboard import TensorBoard
    except ImportError as error:
        raise _missing("tensorboard", error) from error
    return TensorBoard


@WRITERS.register("wandb")
def weights_and_biases() -> type[Writer]:
    """A run of Weights & Biases."""
    try:
        from gapfx.writers.to_wandb import WeightsAndBiases
    except ImportError as error:
        raise _missing("wandb", error) from error
    return WeightsAndBiases


def _missing(name: str, error: ImportError) -> UserError:
    return UserError(
        f"events cannot be written to {name}: {error}",
        where=f"--log-to {name}",
        fix=f"pip install -c constraints.txt 'gapfx[{name}]', or leave it out",
    )


def check_writers(names: str, *, is_new: bool) -> None:
    """Raise UserError for a writer that is unknown or cannot work here. `names` are split by commas."""
    for name in _split(names):
        WRITERS[name]().check(is_new=is_new)


def _split(names: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in names.split(","))) if names.strip() else []


@dataclass
class Writers:
    """Gives every event to all writers. One that fails gets no more, and a warning event tells of it."""

    reader: Reader
    open: dict[str, Writer] = field(default_factory=dict[str, Writer])

    def offer(self, event: Mapping[str, Any]) -> list[Event]:
        """Warnings about the writers that have failed with this event, which is in metrics.jsonl already."""
        if not self.open:
            return []
        points = self.reader.read(event)
        return [*self._failures(self.open, [points])]

    def replay(self, kept: Sequence[Points]) -> list[Event]:
        """Give each writer what it does not have of a run that goes on; warnings as of `offer`."""
        warnings: list[Event] = []
        for name, writer in list(self.open.items()):
            lacking = [points for points in kept if points.step >= writer.replay_from]
            warnings += self._failures({name: writer}, lacking)
        return warnings

    def close(self, *, is_done: bool, step: int) -> list[Event]:
        """End all writers; warnings as of `offer`."""
        warnings: list[Event] = []
        for name, writer in self.open.items():
            try:
                writer.close(is_done=is_done)
            except Exception as error:
                warnings.append(_warning(name, error, step))
        self.open.clear()
        return warnings

    def _failures(self, writers: Mapping[str, Writer], every: Iterable[Points]) -> Iterator[Event]:
        for points in every:
            for name, writer in list(writers.items()):
                if name not in self.open:
                    continue
                try:
                    new = _untold(points, writer.told)
                    if new.scalars or new.texts:
                        writer.write(new)
                except Exception as error:
                    del self.open[name]
                    yield _warning(name, error, points.step)


def open_writers(
    names: str,
    folder: Path,
    plan: Plan,
    settings: Mapping[str, Any],
    *,
    step: int = 0,
    before: Sequence[Event] = (),
    kept: Sequence[Event] = (),
    is_resumed: bool = False,
) -> tuple[Writers, list[Event]]:
    """The writers of a run, and warnings about those that have failed.

    A run that goes on from `step` gives the events that metrics.jsonl held `before`, and those of them that it has
    `kept`. A writer that cannot be opened stops a new run by UserError, and is only warned of in one that goes on.
    """
    writers, warnings = Writers(Reader(plan)), list[Event]()
    if not names:
        return writers, warnings
    opening = Opening(folder, settings, step, read_all(plan, before))
    for name in _split(names):
        try:
            writers.open[name] = WRITERS[name]()(opening)
        except Exception as error:
            if not is_resumed:
                raise UserError(
                    f"{name} cannot be started: {type(error).__name__}: {error}",
                    where="--log-to",
                    fix="mend it and go on with --resume, or leave it out",
                ) from error
            warnings.append(_warning(name, error, step))
    return writers, [*warnings, *writers.replay([writers.reader.read(event) for event in kept])]


def _untold(points: Points, told: dict[str, int]) -> Points:
    """The points that are not told yet, which are told from now on; a note may be one of several at its step."""
    new = {tag for tag in (*points.scalars, *points.texts) if tag == "note" or points.step > told.get(tag, -1)}
    told |= dict.fromkeys(new, points.step)
    scalars = {tag: value for tag, value in points.scalars.items() if tag in new}
    return Points(points.step, scalars, {tag: text for tag, text in points.texts.items() if tag in new})


def _warning(name: str, error: Exception, step: int) -> Event:
    problem = f"{name} failed and gets no more events: {type(error).__name__}: {error}"
    return {"event": "warning", "step": step, "writer": name, "problem": problem}
