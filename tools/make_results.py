"""Write RESULTS.md from the records of finished studies: `python tools/make_results.py --out RESULTS.md`.

A study is `examples/studies/NAME.toml`, whose first lines, comments, are its command and what it shows, with its
records in `runs.jsonl` of the folder NAME beside it. Nothing is trained: every number on the page comes from records.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).parent.parent))

from gapfx.compare.judge import collected
from gapfx.compare.records import RECORDS, Records
from gapfx.compare.story import story

ROOT = Path(__file__).parent.parent
INTRODUCTION = """# Results

Made by `python tools/make_results.py --out RESULTS.md` from the records of runs in `examples/studies/*/runs.jsonl`.
Each section names the command that trained them; with `--collect` it makes the page with the figures from the records.
Kernels were chosen by their speed on the machine of the day. Runs of equal settings with other kernels, or with another
version, differ by rounding at first and by as much as two seeds at the end.
"""


def comments(path: Path) -> list[str]:
    """The comment lines that a file begins with, without their sign."""
    lines: list[str] = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return lines


def section(path: Path, folder: Path) -> Iterator[str]:
    """One study in paragraphs."""
    command, *words = comments(path)
    tables, records = collected(path, folder), Records.read(folder)
    yield f"## {path.stem}"
    yield f"`{command}`"
    yield " ".join(words)
    yield story(tables)
    yield tables.markdown()
    yield _versions(records)


def _versions(records: Records) -> str:
    counts = Counter(tuple(sorted(record.versions.items())) for record in records.found.values())
    told = (
        f"{count} runs with " + ", ".join(f"{name} {version}" for name, version in versions)
        for versions, count in counts.items()
    )
    hours = sum(record.seconds for record in records.found.values()) / 3600
    return f"{'; '.join(told)}; {hours:.1f} hours of training in all."


def results(studies: Path) -> str:
    """The whole page; studies without a record are left out."""
    found = [path for path in sorted(studies.glob("*.toml")) if (studies / path.stem / RECORDS).is_file()]
    parts = [part for path in found for part in section(path, studies / path.stem)]
    return "\n\n".join([INTRODUCTION.strip(), *parts]) + "\n"


def main(
    out: Annotated[Path, typer.Option(help="File to write.")],
    studies: Annotated[Path, typer.Option(help="Folder of the studies.")] = ROOT / "examples" / "studies",
) -> None:
    """Write the page of results."""
    out.write_text(results(studies))


if __name__ == "__main__":
    typer.run(main)
