"""`fedstrata run --dry-run`: the resolved config, who trains what when, and the bytes it will take. Trains nothing."""

from dataclasses import dataclass, replace

import yaml
from rich.console import Console
from rich.table import Table

from fedstrata.core.config import RunConfig, to_dict
from fedstrata.scenarios.stream import Scenario
from fedstrata.server import launch
from fedstrata.server.participation import draw
from fedstrata.server.report import human_bytes
from fedstrata.server.scoring import cut


@dataclass(frozen=True)
class Bytes:
    """Raw tensor bytes of a whole run; bytes_eval assumes that methods with subspaces end with one per task."""

    up: int
    down: int
    evaluation: int


def show(config: RunConfig, console: Console) -> None:
    """Prints the plan of a run.

    Raises:
        BadInput: whatever would stop the run before its first round.
    """
    local = replace(config, federation=replace(config.federation, grid="inprocess"))
    prepared = launch.prepare(local)
    try:
        text = yaml.safe_dump(to_dict(config), sort_keys=False)
        console.print(text, highlight=False, markup=False, soft_wrap=True)
        console.print(schedule(prepared.scenario, config))
        size, bytes_ = launch.cohort_size(config, prepared.layout), predict(prepared)
        console.print(f"scenario hash {prepared.scenario.hash}", highlight=False, soft_wrap=True)
        console.print(f"cohorts of {size} · adapter {prepared.layout.size(config.lora.rank):,} parameters per subspace")
        for name, count in (("up", bytes_.up), ("down", bytes_.down), ("evaluation", bytes_.evaluation)):
            console.print(f"predicted bytes {name}: {count:,} ({human_bytes(count)})", highlight=False)
    finally:
        prepared.close()


def schedule(scenario: Scenario, config: RunConfig) -> Table:
    """Stage × client: the client's task and samples; a client that no round of the stage draws shows a dot."""
    table = Table("client", *scenario.stage_names, title="schedule: task(s) and samples of each drawn client")
    rows: dict[int, list[str]] = {client: ["·"] * len(scenario.stages) for client in range(scenario.client_count)}
    for stage in range(len(scenario.stages)):
        for client, tasks in _drawn(scenario, config, stage).items():
            names = "+".join(scenario.tasks[task].name for task in sorted(tasks))
            rows[client][stage] = f"{names} {scenario.share_size(tasks, client)}"
    for client, cells in rows.items():
        table.add_row(str(client), *cells)
    return table


def _drawn(scenario: Scenario, config: RunConfig, stage: int) -> dict[int, set[int]]:
    """{client: tasks it trains in some round of the stage}."""
    found: dict[int, set[int]] = {}
    for client, tasks in _visits(scenario, config, stage, pooled=False):
        found.setdefault(client, set()).update(tasks)
    return found


def predict(prepared: launch.Prepared) -> Bytes:
    """What the run will move if every participant trains and answers; a client's token is asked for once per data."""
    config, scenario, strategy = prepared.config, prepared.scenario, prepared.strategy()
    stages = [_visits(scenario, config, stage, strategy.pooled) for stage in range(len(scenario.stages))]
    trains = sum(len(visits) for visits in stages)
    adapter = 4 * prepared.layout.size(strategy.adapter_rank)
    token = 4 * prepared.description.dim if strategy.needs_tokens else 0
    asked = {(client, scenario.data_key(tasks, client)) for visits in stages for client, tasks in visits}
    known = len(strategy.knowledge().adapters)
    rows = [[visit for visits in stages[:row] for visit in visits] for row in range(len(stages) + 1)]
    seen = [{task for _, tasks in row for task in tasks} for row in rows]
    adapters = sum(known or len(tasks) for tasks in seen)
    shards = len(cut(scenario, config.evaluate.split, config.evaluate.shard))
    return Bytes(trains * adapter + token * len(asked), trains * adapter, shards * adapters * (adapter + token))


def _visits(scenario: Scenario, config: RunConfig, stage: int, pooled: bool) -> list[tuple[int, tuple[int, ...]]]:
    """(client, its tasks) of every client-round of a stage; a client without data of its tasks has no part in it."""
    found = []
    for round_ in range(1, config.federation.rounds_per_stage + 1):
        for position, client in enumerate(draw(config, scenario.client_count, stage + 1, round_)):
            tasks = tuple(range(len(scenario.tasks))) if pooled else scenario.tasks_of(stage, position)
            if scenario.share_size(tasks, client):
                found.append((client, tasks))
    return found
