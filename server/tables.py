"""What `compare` finds, as values, and how it is written: for a terminal, as Markdown, as CSV, as JSON."""

import csv
import io
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fedstrata.server.paired import Paired
from fedstrata.server.report import UNDEFINED, human_bytes, human_seconds, number

How = tuple[str, Callable[[float | None], str]]  # heading, how it is written
MEASURES: Mapping[str, How] = {  # by key of the summary
    "last": ("last", number),
    "avg": ("avg", number),
    "forgetting": ("forgetting", number),
    "bwt": ("bwt", number),
    "routing_accuracy": ("routing", number),
    "vocabulary_rate": ("vocabulary", number),
    "bytes_up": ("bytes up", human_bytes),
    "train_seconds": ("train time", human_seconds),
}
OPTIONAL: Mapping[str, How] = {  # shown where a run has them
    "pretrained_before": ("pre-training tasks: base", number),
    "pretrained": ("pre-training tasks: after", number),
    "unseen_before": ("unseen tasks: base", number),
    "unseen": ("unseen tasks: after", number),
}
ABREAST = 5  # methods side by side in a terminal of 80 columns
Grid = list[list[str]]  # the first row holds the headings


@dataclass(frozen=True)
class Spread:
    """Mean over n seeds and the sample standard deviation (ddof = 1; None for a single seed)."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Spread | None":
        """Of the defined values; None when there are none."""
        found = [value for value in values if value is not None]
        if not found:
            return None
        return cls(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, len(found))


@dataclass(frozen=True)
class Row:
    """One method with its options in one scenario; `seeds` is empty when no run of it was completed here."""

    label: str
    strategy: str
    seeds: tuple[int, ...]
    empty: str  # what its cells read without runs
    measures: Mapping[str, Spread | None]
    tasks: Mapping[str, Spread | None]  # last score of each task
    stages: tuple[Spread | None, ...] = ()  # score of the tasks so far, after each stage


@dataclass(frozen=True)
class ScenarioTable:
    """All methods on one scenario. `gaps`: label → (D − F)/(J − F) in percent, None where J − F is below 20 points.

    `differences`: label → paired difference of `last` to the row `baseline`; empty without one.
    """

    scenario: str
    tasks: tuple[str, ...]
    rows: tuple[Row, ...]
    gaps: Mapping[str, float | None]
    baseline: str = ""
    differences: Mapping[str, Paired | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Runs side by side; `notes` tell what was left out or looks wrong."""

    tables: tuple[ScenarioTable, ...]
    notes: tuple[str, ...]

    def table(self) -> Group:
        """For a terminal: per scenario one table of measures and one of last scores by task, then the notes."""
        shown = [part for table in self.tables for title, grid in grids(table) for part in _rich(title, grid)]
        return Group(*shown, *map(Text, self.notes))

    def markdown(self) -> str:
        """The same as Markdown tables."""
        parts = [_markdown(title, grid) for table in self.tables for title, grid in grids(table)]
        notes = "".join(f"- {_escaped(note)}\n" for note in self.notes)
        return "\n".join([*parts, notes] if notes else parts)

    def csv(self) -> str:
        """Unrounded, one line per scenario, strategy and measure; "last/<task>" are the last scores by task."""
        out = io.StringIO()
        columns = ["scenario", "strategy", "measure", "mean", "std", "seeds"]
        writer = csv.DictWriter(out, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.json()["values"])
        return out.getvalue()

    def json(self) -> dict[str, Any]:
        """{values: [{scenario, strategy, measure, mean, std, seeds}], notes}; mean is a number, null or "not run"."""
        return {"values": [line for table in self.tables for line in _lines(table)], "notes": list(self.notes)}


def _lines(table: ScenarioTable) -> Iterator[dict[str, Any]]:
    for row in table.rows:
        where = {"scenario": table.scenario, "strategy": row.label}
        shown = {name: row.measures[name] for name in _shown(table)}
        named = {**shown, **{f"last/{task}": row.tasks[task] for task in table.tasks}}
        for measure, spread in named.items():
            mean = row.empty if not row.seeds else spread.mean if spread else None
            std, n = (spread.std, spread.n) if spread else (None, 0)
            yield {**where, "measure": measure, "mean": mean, "std": std, "seeds": n}
        if table.gaps.get(row.label) is not None:
            seeds = len(row.seeds)
            yield {**where, "measure": "gap_closed", "mean": table.gaps[row.label], "std": None, "seeds": seeds}
        if found := table.differences.get(row.label):
            for measure, mean in (("difference", found.mean), ("difference_ci95", found.half)):
                yield {**where, "measure": measure, "mean": mean, "std": None, "seeds": found.n}


def grids(table: ScenarioTable) -> list[tuple[str, Grid]]:
    """(title, grid) of the measures and of the last scores by task."""
    gap = ["gap closed"] if table.gaps else []
    above = [f"last above {table.baseline} (95 %)"] if table.baseline else []
    shown = _shown(table)
    heads = ["strategy", "seeds", *(heading for heading, _ in shown.values()), *gap, *above]
    body = [[row.label, str(len(row.seeds)), *_measures(row, shown), *_gap(table, row)] for row in table.rows]
    by_task = [[row.label, *(_cell(row, row.tasks[task], number) for task in table.tasks)] for row in table.rows]
    tasks = [(f"{table.scenario}: last, by task", [["strategy", *table.tasks], *by_task])]
    return [(table.scenario, [heads, *body]), *(tasks if table.tasks else [])]  # without a run no task is known


def _shown(table: ScenarioTable) -> dict[str, How]:
    more = {name: how for name, how in OPTIONAL.items() if any(row.measures.get(name) for row in table.rows)}
    return {**MEASURES, **more}


def _measures(row: Row, shown: Mapping[str, How]) -> list[str]:
    return [_cell(row, row.measures[name], write) for name, (_, write) in shown.items()]


def _cell(row: Row, spread: Spread | None, write: Callable[[float | None], str]) -> str:
    if not row.seeds:
        return row.empty
    if spread is None:
        return UNDEFINED
    return write(spread.mean) if spread.std is None else f"{write(spread.mean)} ± {write(spread.std)}"


def _gap(table: ScenarioTable, row: Row) -> list[str]:
    """The last columns: the gap closed and the difference to the baseline, where the table has them."""
    gap, found = table.gaps.get(row.label), table.differences.get(row.label)
    cells = [UNDEFINED if gap is None else f"{gap:.0f} %"] if table.gaps else []
    return [*cells, *([UNDEFINED if found is None else found.text()] if table.baseline else [])]


def _rich(title: str, grid: Grid) -> Iterator[Table]:
    """Turned over, one column per method: a terminal is seldom wide enough for eight tasks, or for many methods."""
    names, *methods = grid
    for start in range(0, len(methods), ABREAST):
        heads, *rows = zip(names, *methods[start : start + ABREAST], strict=True)
        table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
        for i, heading in enumerate(heads):
            table.add_column(Text(heading), justify="right" if i else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        yield table


def _markdown(title: str, grid: Grid) -> str:
    lines = ["| " + " | ".join(map(_escaped, row)) + " |" for row in grid]
    rule = "|" + "|".join([":--", *["--:"] * (len(grid[0]) - 1)]) + "|"
    return "\n".join([f"**{_escaped(title)}**", "", lines[0], rule, *lines[1:], ""])


def _escaped(text: str) -> str:
    """Names may hold what Markdown or HTML would take for its own."""
    for sign, safe in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("*", "\\*"), ("\n", " ")):
        text = text.replace(sign, safe)
    return text
