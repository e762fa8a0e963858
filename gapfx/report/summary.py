"""A run in a few lines for the terminal."""

from __future__ import annotations

from pathlib import Path

from gapfx.quantities import format_bytes
from gapfx.report.facts import headline, state_line, story
from gapfx.report.read_run import number, read_run


def format_summary(run_dir: Path) -> str:
    """The story and the three facts of a run, aligned, without a last line break. Raises UserError for no run."""
    run = read_run(run_dir)
    facts = [(fact.label, fact.value, fact.detail) for fact in headline(run)]
    memory = number(run.fact("peak_rss_bytes"))
    if memory is not None:
        facts.append(("Peak memory of a rank", format_bytes(memory), ""))
    label_width, value_width = (max(len(fact[column]) for fact in facts) for column in (0, 1))
    lines = [f"{run.path.resolve().name}: {story(run)}"]
    if not run.is_finished:
        lines.append(f"Not finished: {state_line(run)}.")
    lines += [f"  {label:<{label_width}}  {value:>{value_width}}  {detail}".rstrip() for label, value, detail in facts]
    return "\n".join([*lines, *(f"  note: {note}" for note in run.notes)])
