"""COVERAGE.md: what the results of a sweep say, as Markdown."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tools.zoo_cases.checks import FORWARDS, SECONDS, is_slow

Row = dict[str, Any]
TWO_RANKS = " on two ranks"
CONDITIONS = (
    "Made by `python tools/zoo.py table` from `tools/zoo_cases/results.jsonl`, which `tools/zoo.py sweep` measured.",
    "Each architecture is random initialised (parameters that start as zeros too) and small, runs in a process of its",
    "own on one thread of a shared CPU, which may be busy, so that seconds are upper bounds,",
    "and is compared with the same model whose weights and gradients are multiplied by random masks by hand (half of",
    "each weight is kept): outputs, loss, every gradient, every buffer and every weight after a step of training,",
    "outputs in eval, and the same training step at another batch size. The graph of the whole model (the outline) is",
    "compared with the model itself, in training and in eval. Every matrix must be in exactly one group or be named as",
    "dense, under all of its names; keys of `state_dict` and names of parameters must stay. The masked model is",
    "verified when it is made, on the other batch size where the model runs it. Equal: within 1e-5 of",
    "max(1, largest value) of each tensor, and NaN only where the reference has NaN; `to the bit` counts the models",
    "with no difference at all. An architecture that does not train without gapfx is listed and not counted. Forwards",
    "are those of training; gapfx runs one in eval too: where the limit is passed, all is measured again, and the",
    "slower forward counts.",
)
COLUMNS = (
    "library",
    "run in eager",
    "pass every check",
    "fail",
    "to the bit",
    "capture + plan, s: median / max",
    f"more than {FORWARDS} forwards + {SECONDS:g} s",
    "peak MiB: median / max",
)
KIND_COLUMNS = ("kind", "models", "forward, s: median / max", *COLUMNS[5:])
LISTED = ("architecture", "family", "", "weights", "groups", "dense", "capture + plan, s", "peak MiB")
MARKS = {"passed": "", "failed": "fails", "not runnable": "not runnable"}


def markdown(rows: Sequence[Row]) -> str:
    """The whole page: summaries by library and kind, every failure with its cause, and every architecture by name."""
    alone = [row for row in rows if not row["key"].endswith(TWO_RANKS)]
    ran = [row for row in alone if row["status"] != "not runnable"]
    parts = ["# Coverage", " ".join(CONDITIONS), _versions(rows)]
    parts += [_table(COLUMNS, [*_by(alone, _library, _summary), _summary("all", alone)])]
    parts += ["## By kind of model", _table(KIND_COLUMNS, sorted(_by(ran, _kind, _kind_cells)))]
    parts += _section("Failures", [row for row in rows if row["status"] == "failed"], _causes)
    parts += _section(f"Slower than {FORWARDS} forwards + {SECONDS:g} s", [row for row in ran if _slow(row)], _pace)
    parts += _section("Blocks larger than a mean group, split", _having(ran, "pieces"), _pieces)
    parts += _section("Owners that verification demoted", _having(ran, "demoted"), _demoted)
    parts += _section("Do not repeat themselves without gapfx", _having(ran, "varies"), _fact("varies"))
    parts += _section("NaN in the reference and in the masked model", _having(ran, "train_nan"), _fact("train_nan"))
    parts += _section("Less than half of the weights get a gradient", [row for row in ran if _is_numb(row)], _live)
    for name, text in (("batch", "another batch size"), ("eval", "eval")):
        key = f"{name}_not_runnable"
        parts += _section(f"Not run without gapfx at {text}", _having(ran, key), _fact(key))
    parts += _two_ranks([row for row in rows if row["key"].endswith(TWO_RANKS)])
    parts += _section("Notes of gapfx", _having(ran, "refusals"), _refusals)
    parts += _section("Not runnable without gapfx", [row for row in alone if row not in ran], _causes)
    parts += ["## Every architecture", *_by(alone, _library, _listing)]
    return "\n\n".join(parts) + "\n"


def _library(row: Row) -> str:
    return row["key"].partition("/")[0]


def _kind(row: Row) -> str:
    return row["facts"].get("kind", _library(row))


def _by(rows: Iterable[Row], key: Callable[[Row], str], make: Callable[[str, list[Row]], Any]) -> list[Any]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return [make(name, items) for name, items in groups.items()]


def _table(columns: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (columns, ["---"] * len(columns), *lines))


def _versions(rows: Iterable[Row]) -> str:
    found = sorted({version for row in rows for version in row.get("versions", ())}, key=str.lower)
    commits = sorted({row["commit"] for row in rows if "commit" in row})
    return f"With {', '.join(found) or 'unknown versions'}; commits of gapfx: {', '.join(commits) or 'unknown'}."


def _summary(library: str, rows: Sequence[Row]) -> list[object]:
    ran = [row for row in rows if row["status"] != "not runnable"]
    passed = sum(row["status"] == "passed" for row in ran)
    bits = sum(all(row["facts"].get(f"{name}_bits", False) for name in ("train", "eval")) for row in ran)
    return [library, len(ran), passed, len(ran) - passed, bits, *_cost(ran)]


def _kind_cells(kind: str, rows: Sequence[Row]) -> list[object]:
    return [kind, len(rows), _spread(rows, "forward_seconds", 3), *_cost(rows)]


def _cost(rows: Sequence[Row]) -> list[object]:
    return [_spread(rows, "compile_seconds", 2), sum(map(_slow, rows)), _spread(rows, "peak_mib", 0)]


def _spread(rows: Iterable[Row], fact: str, digits: int) -> str:
    values = [row["facts"][fact] for row in rows if fact in row["facts"]]
    return f"{statistics.median(values):.{digits}f} / {max(values):.{digits}f}" if values else "-"


def _slow(row: Row) -> bool:
    return is_slow(row["facts"])


def _is_numb(row: Row) -> bool:
    return 2 * row["facts"].get("live", 0) < row["facts"].get("weights", 0) and "live" in row["facts"]


def _having(rows: Iterable[Row], fact: str) -> list[Row]:
    return [row for row in rows if fact in row["facts"]]


def _section(title: str, rows: Sequence[Row], line: Callable[[Row], str]) -> list[str]:
    text = "\n".join(f"- `{row['key']}`: {' '.join(line(row).split())}" for row in rows)
    return [f"## {title}", text or "None."]


def _causes(row: Row) -> str:
    return "; ".join(f"{name}: {cause[:300]}" for name, cause in row["failures"].items())


def _fact(name: str) -> Callable[[Row], str]:
    return lambda row: str(row["facts"][name])


def _pace(row: Row) -> str:
    facts = row["facts"]
    in_eval = f", in eval {facts['eval_forward_seconds']:.3f} s" if "eval_forward_seconds" in facts else ""
    return f"{facts['compile_seconds']:.2f} s, a forward takes {facts['forward_seconds']:.3f} s{in_eval}"


def _pieces(row: Row) -> str:
    pieces = row["facts"]["pieces"]
    return "; ".join(pieces[:3]) + (f"; {len(pieces) - 3} more" if len(pieces) > 3 else "")


def _demoted(row: Row) -> str:
    return "; ".join(row["facts"]["demoted"])


def _live(row: Row) -> str:
    return f"{row['facts']['live']} of {row['facts']['weights']}"


def _refusals(row: Row) -> str:
    shown = row["facts"]["refusals"]
    left = row["facts"]["notes"] - len(shown)
    return "; ".join(shown) + (f"; {left} more" if left else "")


def _two_ranks(rows: Sequence[Row]) -> list[str]:
    passed = [f"`{row['key'].removesuffix(TWO_RANKS)}`" for row in rows if row["status"] == "passed"]
    text = (
        f"{len(passed)} of {len(rows)} pass: under DistributedDataParallel with gloo, both ranks get the mean of the "
        f"gradients of two runs in one process, and masked weights stay 0 after a step. {', '.join(passed)}."
    )
    return ["## Two ranks", text] if rows else []


def _listing(library: str, rows: Sequence[Row]) -> str:
    lines = _table(LISTED, [_cells(row) for row in rows])
    return f"<details><summary>{library}: {len(rows)}</summary>\n\n{lines}\n\n</details>"


def _cells(row: Row) -> list[object]:
    facts = row["facts"]
    seconds = f"{facts['compile_seconds']:.2f}" if "compile_seconds" in facts else ""
    name, numbers = row["key"].partition("/")[2], [facts.get(key, "") for key in ("weights", "groups", "dense")]
    return [name, row["family"], MARKS[row["status"]], *numbers, seconds, facts.get("peak_mib", "")]
