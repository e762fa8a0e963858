"""What a study has found as tables: text, Markdown or JSON."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass

from gapfx.compare.outcomes import Duel, Outcome, Row, duels_of, rows_of
from gapfx.compare.statistics import Difference
from gapfx.compare.study import Budget, Study
from gapfx.quantities import format_bytes, format_count

HEADS: dict[Budget, str] = {
    "epochs": "At equal epochs",
    "flops": "At equal operations of training, counted for the sparse form",
}
_COLUMNS = (
    "method",
    "sparsity",
    "mean",
    "sd",
    "by seed",
    "against dense",
    "p",
    "epochs",
    "operations",
    "live bytes",
    "seconds",
)
_DUEL_COLUMNS = ("method", "pairs", "difference", "won", "p")
Lines = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Tables:
    """A table of rows a budget, and one of the study's subject against each other contender where it has a subject.

    `num_runs` are the finished runs behind them, without those that chose learning rates.
    """

    study: Study
    rows: Sequence[Row]
    duels: Sequence[Duel]
    num_runs: int

    @staticmethod
    def of(study: Study, outcomes: Sequence[Outcome]) -> Tables:
        """What the finished runs came to."""
        return Tables(study, rows_of(study, outcomes), duels_of(study, outcomes), len(outcomes))

    def budgets(self) -> list[Budget]:
        """Those that there are rows of."""
        return list(dict.fromkeys(row.budget for row in self.rows))

    def of_budget(self, budget: Budget) -> list[tuple[str, Lines]]:
        """The tables of a budget, each with its title and its head line first."""
        found: list[tuple[str, Lines]] = [
            (HEADS[budget], [self.columns(), *(cells(row) for row in self.rows if row.budget == budget)])
        ]
        duels = [_duel_cells(duel) for duel in self.duels if duel.budget == budget]
        title = f"{self.study.subject} less each other method, over all sparsities and seeds that both have"
        return [*found, *([(title, [_DUEL_COLUMNS, *duels])] if duels else [])]

    def columns(self) -> list[str]:
        """Names of the columns of the rows."""
        own = [f"{self.study.metric}, mean" if name == "mean" else name for name in _COLUMNS]
        return [*own, *(f"{metric}, mean" for metric in self.study.also)]

    def markdown(self) -> str:
        """`p` is of no difference between runs of the same seed (sign-flip test)."""
        return "\n\n".join(_markdown(title, lines) for title, lines in self._all())

    def text(self) -> str:
        """The same in columns for a terminal."""
        return "\n\n".join(_text(title, lines) for title, lines in self._all())

    def json(self) -> str:
        """All numbers."""
        rows, duels = ([dataclasses.asdict(each) for each in found] for found in (self.rows, self.duels))
        return json.dumps(
            {"metric": self.study.metric, "lr_scale": self.lr_scales(), "rows": rows, "duels": duels}, indent=1
        )

    def lr_scales(self) -> dict[str, float]:
        """What tuning chose, by contender."""
        tuned = self.study.contenders if self.study.tune else ()
        return {c.name: c.settings["lr_scale"] for c in tuned if "lr_scale" in c.settings}

    def _all(self) -> list[tuple[str, Lines]]:
        return list(itertools.chain.from_iterable(self.of_budget(budget) for budget in self.budgets()))


def _markdown(title: str, lines: Lines) -> str:
    head, *rest = lines
    table = [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rest)]
    return "\n".join([f"**{title}**", "", *table])


def _text(title: str, lines: Lines) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([f"{title}:", *(row.rstrip() for row in rows)])


def _duel_cells(duel: Duel) -> list[str]:
    found = duel.difference
    pairs = found.num_pairs
    return [duel.name, str(pairs), f"{found.mean:+.4f}", f"{duel.num_won} of {pairs}", _p(found.p)]


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _of_fewer(row: Row, against: Difference) -> str:
    """A difference is of the seeds that both have."""
    num_seeds = len(row.value.values)
    return f" ({against.num_pairs} of {num_seeds} seeds)" if against.num_pairs < num_seeds else ""


def cells(row: Row) -> list[str]:
    """One line of a table."""
    against = row.against
    return [
        row.name,
        f"{row.sparsity:g}",
        f"{row.value.mean:.4f}",
        "" if row.value.deviation is None else f"{row.value.deviation:.4f}",
        ", ".join(f"{value:.4f}" for value in row.value.values),
        f"{against.mean:+.4f}{_of_fewer(row, against)}" if against else "",
        f"{against.p:.2f}" if against else "",
        f"{row.epochs:.1f}",
        format_count(row.flops),
        format_bytes(row.live_bytes),
        f"{row.seconds:.0f}",
        *(f"{value:.4f}" for value in row.also.values()),
    ]
