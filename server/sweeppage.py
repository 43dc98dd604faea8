"""What a sweep shows: its cells before it runs, its table, and one self-contained HTML page with curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from fedstrata.core import durable
from fedstrata.server.compare import BASELINE, side_by_side
from fedstrata.server.report import UNDEFINED, environment, human_seconds
from fedstrata.server.sweep import COMPLETED, State
from fedstrata.server.tables import Comparison, ScenarioTable, grids
from fedstrata.strategies import STRATEGIES


def comparison(states: Sequence[State], baseline: str) -> Comparison:
    """The table of a sweep; cells that were not run read so. baseline: empty takes finetune where that is a row."""
    defaults = {name: vars(kind.config_type()) for name, kind in STRATEGIES.items()}
    results = [state.result() for state in states]
    rows = [row.label for table in side_by_side(results, defaults).tables for row in table.rows]
    return side_by_side(results, defaults, baseline or (BASELINE if BASELINE in rows else ""))


def write_page(path: Path, states: Sequence[State], compared: Comparison) -> None:
    """One page that needs nothing else."""
    told = {
        "cells": len(states),
        "done": sum(state.status == COMPLETED for state in states),
        "scenarios": [_scenario(table) for table in compared.tables],
        "states": states,
        "notes": compared.notes,
    }
    page = environment().get_template("sweep.html.j2").render(told)
    durable.write_atomic(path, page.encode())


def _scenario(table: ScenarioTable) -> dict[str, Any]:
    from fedstrata.server import figures  # here: matplotlib takes long to import

    lines = {
        row.label: [(s.mean, s.std or 0.0) for s in row.stages if s is not None] for row in table.rows if row.seeds
    }
    tables = [(title, grid[0], grid[1:]) for title, grid in grids(table)]
    curves = Markup(figures.averages(lines)) if lines else ""  # matplotlib escapes what it writes
    return {"name": table.scenario, "tables": tables, "curves": curves}


def show_plan(states: Sequence[State], jobs: int, console: Console) -> None:
    """Every cell, where it stands and about how long it will take; nothing is trained.

    A kind of cell (all but the seed) of which one is completed takes as long as that one took; others are measured.

    Raises:
        BadInput: whatever would stop a cell before its first round.
    """
    took = _took(states)
    table, left = Table("cell", "status", "predicted time"), 0.0
    for state in states:
        about = UNDEFINED
        if state.status != COMPLETED:
            seconds = fmean(took.get(_kind(state)) or took.setdefault(_kind(state), [_measured(state)]))
            about, left = human_seconds(seconds), left + seconds
        table.add_row(state.cell.name, state.status, about)
    console.print(table)
    missing = sum(state.status != COMPLETED for state in states)
    line = f"{missing} of {len(states)} cells to run, about {human_seconds(left / jobs)} with {jobs} at a time"
    console.print(line, highlight=False, soft_wrap=True)


def _kind(state: State) -> str:
    return repr({key: value for key, value in state.cell.settings.items() if key != "seed"})


def _took(states: Sequence[State]) -> dict[str, list[float]]:
    """Kind → wall seconds of its completed cells."""
    took: dict[str, list[float]] = {}
    for state in states:
        if state.status == COMPLETED and (seconds := state.result().value("wall_seconds")):
            took.setdefault(_kind(state), []).append(seconds)
    return took


def _measured(state: State) -> float:
    from fedstrata.server import plan

    return plan.seconds(state.cell.config)


def summary(states: Sequence[State], compared: Comparison) -> Mapping[str, Any]:
    """For `--json`: cells and table as plain values."""
    cells = [
        {"cell": state.cell.name, "status": state.status, "words": list(state.cell.words), "reason": state.reason}
        for state in states
    ]
    return {"cells": cells, **compared.json()}
