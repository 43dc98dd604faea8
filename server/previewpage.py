"""A preview for people: tables in the terminal, a heat map as PNG, and one self-contained HTML page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
from markupsafe import Markup
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from fedstrata.server.figures import COLOURED, INK, STYLE, svg
from fedstrata.server.holdings import client_table
from fedstrata.server.preview import Preview, TaskFacts
from fedstrata.server.report import environment, human_bytes

INKED = 60  # clients up to which the heat map writes numbers


def show(told: Preview, console: Console) -> None:
    """Tasks, who holds what, the schedule by position, and the warnings."""
    sizes = f"{len(told.tasks)} tasks, {len(told.stages)} stages, {len(told.clients)} clients"
    console.print(f"{told.scenario}, seed {told.seed}: {sizes}", highlight=False, markup=False)
    for line in (note for task in told.tasks for note in task.found):
        console.print(f"found: {line}", highlight=False, markup=False)
    for table in (task_table(told.tasks), client_table(told.stages, told.clients), schedule_table(told)):
        console.print(table)
    for line in summary(told):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for line in told.warnings:
        console.print(f"[bold yellow]warning:[/bold yellow] {line}", highlight=False, soft_wrap=True)


def summary(told: Preview) -> list[str]:
    """Hash, work and traffic, as plain lines."""
    lines = [f"scenario hash {told.hash}", f"client-rounds {told.client_rounds:,} · optimiser steps {told.steps:,}"]
    if told.bytes is None:
        return [*lines, f"bytes unknown: {told.unknown}"]
    sizes = (("up", told.bytes.up), ("down", told.bytes.down), ("evaluation", told.bytes.evaluation))
    return lines + [f"predicted bytes {name}: {count:,} ({human_bytes(count)})" for name, count in sizes]


def task_table(tasks: Sequence[TaskFacts]) -> Table:
    """One row a task."""
    table = Table(
        "task", "train", "val", "test", "metric", "answers", "commonest", "tokens 50/90/99/max", title="tasks"
    )
    for task in tasks:
        labels = ", ".join(f"{text[:20]} {count}" for text, count in task.labels[:4])
        tokens = "unknown" if task.tokens is None else "/".join(map(str, task.tokens))
        sizes = (str(task.train), str(task.val), str(task.test))
        table.add_row(task.name, *sizes, " + ".join(task.metrics), str(task.answers), labels, tokens)
    return table


def schedule_table(told: Preview) -> Table:
    """Stage and round × position: the participant and what it trains."""
    rounds: dict[tuple[int, int], dict[int, str]] = {}
    for visit in told.schedule:
        words = "+".join(told.task_names[task] for task in visit.tasks)
        rounds.setdefault((visit.stage, visit.round), {})[visit.position] = f"{visit.client} {words}"
    width = max((position for row in rounds.values() for position in row), default=0) + 1
    heads = [f"position {position}" for position in range(width)]
    table = Table("stage", "round", *heads, title="schedule: client and task(s) at each position")
    for (stage, round_), row in rounds.items():
        table.add_row(str(stage), str(round_), *(row.get(position, "·") for position in range(width)))
    return table


def heat_map(told: Preview, ink: str = INK) -> Figure:
    """Clients down, stages across; colour: samples; numbers and tasks where there is room."""
    clients, stages = len(told.clients), len(told.stages)
    names = {name: number for number, name in enumerate(told.task_names)}
    with matplotlib.style.context(["default", STYLE | dict.fromkeys(COLOURED, ink) | {"svg.hashsalt": "preview"}]):
        height = 1.4 + (0.24 if clients <= INKED else 0.03) * min(clients, 400)
        figure = Figure(figsize=(2.2 + 1.0 * stages, height), layout="constrained")
        axes = figure.add_subplot()
        grid = [[cell.samples for cell in row] for row in told.clients]
        image = axes.imshow(grid, aspect="auto", cmap="viridis", interpolation="nearest")
        axes.set_xticks(range(stages), told.stages, rotation=30, ha="left", rotation_mode="anchor")
        axes.tick_params(length=0, labeltop=True, labelbottom=False)
        axes.set_ylabel("client")
        figure.colorbar(image, ax=axes, label="samples", shrink=0.8)
        if clients <= INKED:
            axes.set_yticks(range(clients))
            _ink(axes, told, names, max(map(max, grid)) or 1)
        return figure


def _ink(axes: Any, told: Preview, names: dict[str, int], most: int) -> None:
    """Task number and samples; bold where the client is drawn."""
    for client, row in enumerate(told.clients):
        for stage, cell in enumerate(row):
            if cell.samples:
                tasks = "+".join(str(names[task] + 1) for task in cell.tasks)
                colour, weight = (
                    ("white" if cell.samples < 0.6 * most else "black"),
                    ("bold" if cell.drawn else "normal"),
                )
                axes.text(
                    stage,
                    client,
                    f"{tasks}: {cell.samples}",
                    ha="center",
                    va="center",
                    color=colour,
                    weight=weight,
                    fontsize=7,
                )


def save_png(told: Preview, path: Path) -> None:
    """The heat map as a picture, black on white."""
    heat_map(told, "black").savefig(path, dpi=150, facecolor="white")


def save_html(told: Preview, path: Path) -> None:
    """One self-contained page."""
    page = environment().get_template("preview.html.j2")
    figure = Markup(svg(heat_map(told)))  # matplotlib escapes what it writes, so its SVG is safe as it is
    path.write_text(page.render(told=told, figure=figure, lines=summary(told)), encoding="utf-8")
