"""The fenced blocks of a Markdown page, with what the HTML comments before each of them say to the tests.

<!-- not run: why -->          nobody runs it here
<!-- run-command -->           .ci/run runs it, and <!-- test-command --> too
<!-- file: NAME -->            its text becomes this file
<!-- smoke: FLAGS -->          tests add these flags to its last command
<!-- exit: 2 -->               its exit code, 0 without this
<!-- with: CODE -->            tests run this before it
<!-- output -->                what the block before it printed: numbers may differ, "..." stands for anything
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")))
RUN_BY_CI = ("run-command", "test-command")
NOTES = (*RUN_BY_CI, "not run", "file", "smoke", "exit", "with", "output")
RUNNABLE = ("bash", "python")
_PIECES = re.compile(
    r"^<!--(?P<note>.*?)-->$|^```(?P<language>\w*)\n(?P<code>.*?)^```$|^(?P<other>[^\n]*\S[^\n]*)$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """A fenced block: the line of its fence, its language, its text, and the comments before it, by their name."""

    page: str
    line: int
    language: str
    text: str
    notes: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def reason(self) -> str:
        """Why tests do not run it; "" for a block that they run or write to a file, or that is no code."""
        if any(note in self.notes for note in RUN_BY_CI):
            return ".ci/run runs it"
        return self.notes.get("not run", "")

    @property
    def is_run(self) -> bool:
        """Whether tests run it."""
        return self.language in RUNNABLE and not self.reason and "file" not in self.notes

    @property
    def code(self) -> str:
        """What tests run."""
        before, flags = self.notes.get("with", ""), self.notes.get("smoke", "")
        return f"{before}\n{self.text}{f' {flags}' if flags else ''}".lstrip("\n")


def blocks_of(page: str) -> list[Block]:
    """The blocks of a page of the repository, in order. Raises ValueError for a comment that is no known note."""
    return list(parse((ROOT / page).read_text(), page))


def parse(text: str, page: str) -> Iterator[Block]:
    """The blocks of a page's text. A comment belongs to the block that follows it, with nothing but space between."""
    notes: dict[str, str] = {}
    for found in _PIECES.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        if found["note"] is not None:
            name, _, value = found["note"].strip().partition(":")
            notes[name.strip()] = value.strip(" ") if name != "with" else value.strip("\n ")
        elif found["language"] is not None:
            _check(notes, page, line)
            yield Block(page, line, found["language"], found["code"].rstrip("\n"), notes)
            notes = {}
        else:
            notes = {}


def _check(notes: Mapping[str, str], page: str, line: int) -> None:
    unknown = sorted(notes.keys() - set(NOTES))
    if unknown:
        raise ValueError(f"{page}:{line}: {unknown[0]!r} is none of {', '.join(NOTES)}")


def not_printed(shown: str, got: str) -> list[str]:
    """The lines of an output in a page that a run did not print in this order, numbers and spaces apart."""
    rest, missing = iter([_plain(line) for line in got.splitlines()]), list[str]()
    for line in shown.splitlines():
        start, dots, _ = line.partition("...")
        wanted = _plain(start)
        if not wanted:
            continue
        if not any(found.startswith(wanted) if dots else found == wanted for found in rest):
            missing.append(line)
            break
    return missing


def _plain(line: str) -> str:
    return " ".join(re.sub(r"\d[\d,.]*(e[+-]?\d+)?", "#", line).split())
