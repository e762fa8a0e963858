import dataclasses
import io
import math
import sys

import pytest

from gapfx.plan import Group, Phase, Plan, Weight
from gapfx.progress import LiveProgress, Pace, PlainProgress, SilentProgress, open_progress

GROUPS = tuple(Group(f"blocks {index}", (Weight(f"blocks.{index}.weight", (8, 8), 0.9),)) for index in range(2))
PLAN = Plan(
    groups=GROUPS,
    phases=(
        Phase("round 1 group 1", 0, 100, grow=(0,), prune=(0,)),
        Phase("round 1 group 2", 100, 200, grow=(1,), prune=(1,)),
        Phase("fine-tune", 200, 1200, round=1),
    ),
)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def plain(clock: Clock) -> tuple[PlainProgress, io.StringIO]:
    stream = io.StringIO()
    return PlainProgress(PLAN, 0, stream, clock), stream


def test_plain_lines_are_aligned_and_name_phase_loss_and_sparsity() -> None:
    clock = Clock()
    progress, stream = plain(clock)
    with progress:
        progress.phase(PLAN.phases[0], PLAN)
        clock.now = 2.0
        progress.step(1, 2.5, 1e-3, 0.9, 0.45)
        clock.now = 20.0
        progress.step(10, 0.25, 1e-3, 0.9, 0.45)
        progress.eval(100, {"accuracy": 0.91234})
        progress.note("pruned blocks 0")
    assert stream.getvalue().splitlines() == [
        "phase 1/3 round 1 group 1, dense: blocks 0, steps 0 to 100",
        "step      1/1,200   0%  loss 2.5         lr 1.00e-03  sparsity  45.0 % (target 90.0 %)  39 min 58 s left",
        "step     10/1,200   1%  loss 0.25        lr 1.00e-03  sparsity  45.0 % (target 90.0 %)  39 min 40 s left",
        "eval    100/1,200   8%  accuracy 0.9123",
        "note  pruned blocks 0",
    ]


def test_plain_steps_are_rate_limited_but_the_last_one_is_told() -> None:
    clock = Clock()
    progress, stream = plain(clock)
    for step in range(1, 1201):
        clock.now += 0.01
        progress.step(step, 1.0, 1e-3, 0.9, 0.9)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4  # 12 seconds: at once, after 5, after 10, and the end
    assert "1,200/1,200 100%" in lines[-1]
    assert lines[-1].endswith("done")


def test_a_phase_is_followed_by_a_step_line_at_once() -> None:
    clock = Clock()
    progress, stream = plain(clock)
    progress.step(1, 1.0, 1e-3, 0.9, 0.9)
    progress.step(2, 1.0, 1e-3, 0.9, 0.9)
    progress.phase(PLAN.phases[1], PLAN)
    progress.step(101, 1.0, 1e-3, 0.9, 0.9)
    assert [line.split()[0] for line in stream.getvalue().splitlines()] == ["step", "phase", "step"]


def test_plain_text_has_no_control_characters_even_when_names_do() -> None:
    clock = Clock()
    progress, stream = plain(clock)
    group = dataclasses.replace(GROUPS[0], name="a\x1b[31mred\nline")
    plan = dataclasses.replace(PLAN, groups=(group, GROUPS[1]))
    progress.phase(plan.phases[0], plan)
    progress.note("one\ntwo\x07")
    text = stream.getvalue()
    assert "a?[31mred line" in text
    assert "note  one two?" in text
    assert all(char.isprintable() or char == "\n" for char in text)


def test_plain_output_survives_a_stream_that_knows_ascii_alone() -> None:
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding="ascii")
    PlainProgress(PLAN, 0, stream, Clock()).note("caf\u00e9")
    assert buffer.getvalue() == b"note  caf?\n"


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_said_in_words(loss: float) -> None:
    progress, stream = plain(Clock())
    progress.step(1, loss, 1e-3, 0.9, 0.9)
    assert "loss not finite" in stream.getvalue()


def test_time_left_follows_the_recent_pace() -> None:
    clock = Clock()
    pace = Pace(num_steps=2000, start_step=0, clock=clock)
    assert pace.seconds_left() is None
    for step in range(1, 1001):  # 1 s a step at first, then 0.1 s
        clock.now += 1.0 if step <= 500 else 0.1
        pace.update(step)
    slow_and_fast = pace.seconds_left()
    for step in range(1001, 1900):
        clock.now += 0.1
        pace.update(step)
    left = pace.seconds_left()
    assert slow_and_fast is not None
    assert 100 <= slow_and_fast <= 550
    assert left is not None
    assert left == pytest.approx(10, rel=0.3)


def test_time_left_counts_only_the_steps_since_a_resume() -> None:
    clock = Clock()
    pace = Pace(num_steps=1000, start_step=900, clock=clock)
    clock.now = 10.0
    pace.update(910)
    assert pace.seconds_left() == pytest.approx(90.0)


def test_nothing_is_left_after_the_last_step_however_slow_or_uneven_steps_are() -> None:
    clock = Clock()
    pace = Pace(num_steps=1000, start_step=0, clock=clock)
    for step in range(1, 1001):
        clock.now += 10.0 if step < 999 else 0.1
        pace.update(step)
    assert pace.seconds_left() == 0


def test_a_file_gets_lines_and_a_terminal_gets_a_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(open_progress(PLAN, start_step=0, stream=io.StringIO()), PlainProgress)
    assert isinstance(open_progress(PLAN, start_step=0, stream=Terminal()), LiveProgress)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_progress(PLAN, start_step=0, stream=Terminal()), PlainProgress)


def test_the_panel_shows_the_run_and_restores_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream, stdout = Terminal(), sys.stdout
    with LiveProgress(PLAN, 0, stream, Clock()) as progress:
        progress.phase(PLAN.phases[1], PLAN)
        progress.step(1200, 0.5, 1e-3, 0.9, 0.45)
        progress.eval(1200, {"accuracy": 0.75})
        progress.note("pruned [bold]blocks[/bold] 1")
    text = stream.getvalue()
    for wanted in ("2/3 round 1 group 2, dense: blocks 1", "1,200/1,200", "45.0 %", "0.75", "[bold]blocks[/bold]"):
        assert wanted in text
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is visible again
    assert sys.stdout is stdout


def test_the_panel_is_drawn_a_few_times_a_second_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    clock, stream = Clock(), Terminal()
    with LiveProgress(PLAN, 0, stream, clock) as progress:
        progress.step(1, 1.0, 1e-3, 0.9, 0.9)
        drawn = len(stream.getvalue())
        for step in range(2, 200):
            progress.step(step, 1.0, 1e-3, 0.9, 0.9)
        assert len(stream.getvalue()) == drawn
        clock.now = 1.0
        progress.step(200, 1.0, 1e-3, 0.9, 0.9)
        assert len(stream.getvalue()) > drawn


def test_silent_progress_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with SilentProgress() as progress:
        progress.phase(PLAN.phases[0], PLAN)
        progress.step(1, 1.0, 1e-3, 0.9, 0.9)
        progress.eval(1, {"loss": 1.0})
        progress.note("text")
    assert capsys.readouterr() == ("", "")
