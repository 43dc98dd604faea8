"""Who trains how much of what, client by client and stage by stage: for `preview` and `--dry-run`."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from fedstrata.scenarios.stream import Scenario
from fedstrata.server.participation import Visit

ROWS = 50  # clients that a terminal shows


@dataclass(frozen=True)
class Cell:
    """A client in a stage: its tasks, its samples, in how many rounds it is drawn."""

    tasks: tuple[str, ...]
    samples: int
    drawn: int


def holdings(scenario: Scenario, plan: Sequence[Visit]) -> tuple[tuple[Cell, ...], ...]:
    """[client][stage]; `plan`: every client-round of the run."""
    drawn: Counter[tuple[int, int]] = Counter((visit.client, visit.stage) for visit in plan)
    tasks: dict[tuple[int, int], dict[int, tuple[int, int]]] = {}
    for visit in plan:  # the last round of the stage in which it trains a task says how much it has of it
        for task in visit.tasks:
            tasks.setdefault((visit.client, visit.stage), {})[task] = (visit.stage, visit.round)
    stages = range(1, len(scenario.stages) + 1)
    return tuple(
        tuple(_cell(scenario, client, stage, tasks.get((client, stage)), drawn[client, stage]) for stage in stages)
        for client in range(scenario.client_count)
    )


def _cell(scenario: Scenario, client: int, stage: int, trained: dict[int, tuple[int, int]] | None, drawn: int) -> Cell:
    """What a client trains in the stage; of one that is not drawn, what it holds in the stage's first round."""
    if trained is None:
        held = scenario.timeline.tasks(client, stage, 1) if scenario.assign is None else ()
        trained = dict.fromkeys(held, (stage, 1))
    samples = sum(scenario.share_size([task], client, *when) for task, when in trained.items())
    return Cell(tuple(scenario.tasks[task].name for task in sorted(trained)), samples, drawn)


def client_table(stages: Sequence[str], clients: Sequence[Sequence[Cell]]) -> Table:
    """Client × stage: task(s), samples, ×rounds in which it is drawn; in brackets what nobody asks for."""
    table = Table("client", *stages, title="schedule: task(s), samples, × rounds drawn of each client; (…): not drawn")
    for client, row in list(enumerate(clients))[:ROWS]:
        table.add_row(str(client), *map(_words, row))
    if len(clients) > ROWS:
        table.add_row(f"… {len(clients) - ROWS} more", *("" for _ in stages))
    return table


def _words(cell: Cell) -> str:
    if not cell.samples:
        return "·"
    text = f"{'+'.join(cell.tasks)} {cell.samples}"
    return f"{text} ×{cell.drawn}" if cell.drawn else f"[dim]({text})[/dim]"
