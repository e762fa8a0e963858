"""Progress of a run on a terminal: a live panel where there is one, aligned lines where the output is a file."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gapfx.plan import Phase, Plan
from gapfx.quantities import format_number, format_seconds, format_share

Clock = Callable[[], float]

SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_FRAMES = 0.2
PACE_SAMPLES = 64
LABEL_WIDTH = 6


class Progress(Protocol):
    """What a training loop tells about itself; a context manager. `step` may be called at every step."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def phase(self, phase: Phase, plan: Plan) -> None:
        """A phase begins: its name and the groups that grow."""
        ...

    def step(self, step: int, loss: float, lr: float, sparsity_target: float, sparsity_actual: float) -> None:
        """`step` optimizer steps are done."""
        ...

    def eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """An evaluation is done."""
        ...

    def note(self, text: str) -> None:
        """One line that stays: a prune, a checkpoint, a resume."""
        ...


def open_progress(plan: Plan, *, start_step: int, stream: TextIO) -> Progress:
    """A live panel when `stream` is a terminal that can move its cursor, plain lines otherwise."""
    if stream.isatty() and os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown"):
        return LiveProgress(plan, start_step, stream)
    return PlainProgress(plan, start_step, stream)


class Pace:
    """Time left, estimated from the last stretch of the run."""

    def __init__(self, num_steps: int, start_step: int, clock: Clock) -> None:
        self._num_steps, self._clock, self._step = num_steps, clock, start_step
        self._samples = deque([(clock(), start_step)], maxlen=PACE_SAMPLES)
        self._seconds_between_samples = 0.0

    def update(self, step: int) -> None:
        """`step` steps are done now."""
        now, self._step = self._clock(), step
        if now - self._samples[-1][0] >= self._seconds_between_samples and step > self._samples[-1][1]:
            self._samples.append((now, step))
            self._seconds_between_samples = (now - self._samples[0][0]) / PACE_SAMPLES

    def seconds_left(self) -> float | None:
        """Seconds until the last step; None before the first step."""
        (first, first_step), (last, last_step) = self._samples[0], self._samples[-1]
        if last_step == first_step:
            return None
        return (last - first) / (last_step - first_step) * (self._num_steps - self._step)


class SilentProgress:
    """Says nothing: for the ranks other than 0, and for use as a library."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def phase(self, phase: Phase, plan: Plan) -> None:
        """Nothing."""

    def step(self, step: int, loss: float, lr: float, sparsity_target: float, sparsity_actual: float) -> None:
        """Nothing."""

    def eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


class PlainProgress(SilentProgress):
    """Aligned lines without control characters: every phase, evaluation and note, and now and then a step."""

    def __init__(self, plan: Plan, start_step: int, stream: TextIO, clock: Clock = time.monotonic) -> None:
        self._plan, self._stream, self._clock = plan, stream, clock
        self._pace = Pace(plan.num_steps, start_step, clock)
        self._next_line = clock()

    def phase(self, phase: Phase, plan: Plan) -> None:
        """One line with the phase's place in the plan, its steps, and what it grows."""
        self._write("phase", f"{_phase_title(phase, plan)}, steps {phase.start:,} to {phase.stop:,}")
        self._next_line = self._clock()

    def step(self, step: int, loss: float, lr: float, sparsity_target: float, sparsity_actual: float) -> None:
        """One line at the start of a phase, at the last step, and every few seconds."""
        self._pace.update(step)
        now = self._clock()
        if now < self._next_line and step != self._plan.num_steps:
            return
        self._next_line = now + SECONDS_BETWEEN_LINES
        columns = (
            f"{_place(step, self._plan)}  loss {_loss(loss):<10}  lr {lr:.2e}",
            f"sparsity {format_share(sparsity_actual):>7} (target {format_share(sparsity_target)})",
            _time_left(self._pace.seconds_left()),
        )
        self._write("step", "  ".join(columns))

    def eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line with every metric."""
        self._write("eval", f"{_place(step, self._plan)}  {_metrics(metrics)}")

    def note(self, text: str) -> None:
        """The text on one line."""
        self._write("note", text)

    def _write(self, label: str, text: str) -> None:
        line = f"{label:<{LABEL_WIDTH}}{_one_line(text)}".rstrip()
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(line.encode(encoding, "replace").decode(encoding) + "\n")
        self._stream.flush()


@dataclass(frozen=True)
class _StepFacts:
    step: int
    loss: float
    lr: float
    sparsity_target: float
    sparsity_actual: float


class LiveProgress(SilentProgress):
    """A panel of three lines that is redrawn in place; phases, evaluations and notes scroll by above it."""

    def __init__(self, plan: Plan, start_step: int, stream: TextIO, clock: Clock = time.monotonic) -> None:
        self._plan, self._clock, self._start_step = plan, clock, start_step
        self._pace = Pace(plan.num_steps, start_step, clock)
        self._console = Console(file=stream, highlight=False)
        # Drawn by `step` alone: a thread that draws would live on in forked data workers.
        self._live = Live(console=self._console, auto_refresh=False)
        self._phase: Phase | None = None
        self._facts: _StepFacts | None = None
        self._metrics = ""
        self._next_frame = clock()

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._draw()
        self._live.stop()

    def phase(self, phase: Phase, plan: Plan) -> None:
        """Show the phase's place in the plan and what it grows."""
        self._phase = phase
        self._say("phase", _phase_title(phase, plan), "bold")

    def step(self, step: int, loss: float, lr: float, sparsity_target: float, sparsity_actual: float) -> None:
        """Redraw, at most a few times a second."""
        self._facts = _StepFacts(step, loss, lr, sparsity_target, sparsity_actual)
        self._pace.update(step)
        if self._clock() >= self._next_frame or step == self._plan.num_steps:
            self._draw()

    def eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the metrics in the panel and in the scrolled text."""
        self._metrics = _one_line(_metrics(metrics))
        self._say("eval", f"step {step:,}  {self._metrics}", "green")

    def note(self, text: str) -> None:
        """The text on one line above the panel."""
        self._say("note", text, "dim")

    def _say(self, label: str, text: str, style: str) -> None:
        self._console.print(Text.assemble((f"{label:<{LABEL_WIDTH}}", "dim"), (_one_line(text), style)))
        self._draw()

    def _draw(self) -> None:
        self._next_frame = self._clock() + SECONDS_BETWEEN_FRAMES
        self._live.update(Padding(self._panel(), (1, 0, 0, 0)), refresh=True)

    def _panel(self) -> RenderableType:
        step = self._facts.step if self._facts else self._start_step
        head = Text(_phase_title(self._phase, self._plan) if self._phase else "starting", "bold", overflow="ellipsis")
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            ProgressBar(
                total=max(self._plan.num_steps, 1),
                completed=step,
                width=40,
                complete_style="cyan",
                finished_style="green",
            ),
            Text(_place(step, self._plan)),
            Text(_time_left(self._pace.seconds_left()), "cyan"),
        )
        return Group(head, bar, self._numbers())

    def _numbers(self) -> Text:
        facts = self._facts
        if facts is None:
            return Text("waiting for the first step", "dim")
        return Text.assemble(
            *_pair("loss", _loss(facts.loss)),
            *_pair("lr", f"{facts.lr:.2e}"),
            *_pair("sparsity", f"{format_share(facts.sparsity_actual)} (target {format_share(facts.sparsity_target)})"),
            (self._metrics, "green"),
        )


def _pair(label: str, value: str) -> tuple[tuple[str, str], tuple[str, str]]:
    return (f"{label} ", "dim"), (f"{value}   ", "")


def _phase_title(phase: Phase, plan: Plan) -> str:
    grown = [plan.groups[index].name for index in phase.grow]
    number = plan.phases.index(phase) + 1 if phase in plan.phases else "?"
    names = ", ".join(grown) if len(grown) <= 3 else f"{len(grown)} groups"
    return f"{number}/{len(plan.phases)} {phase.name}" + (f", dense: {names}" if grown else "")


def _place(step: int, plan: Plan) -> str:
    total = f"{plan.num_steps:,}"
    return f"{step:>{len(total)},}/{total} {step / max(plan.num_steps, 1):4.0%}"


def _loss(loss: float) -> str:
    text = format_number(loss)
    return "not finite" if text == "-" else text


def _time_left(seconds: float | None) -> str:
    return "" if seconds is None else f"{format_seconds(round(seconds))} left" if seconds >= 0.5 else "done"


def _metrics(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {_loss(value)}" for name, value in metrics.items())


def _one_line(text: str) -> str:
    """Line breaks and tabs become spaces, everything else that could move a cursor a question mark."""
    return "".join(char if char.isprintable() else " " if char.isspace() else "?" for char in text.rstrip())
