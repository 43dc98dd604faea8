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
        console.print(yaml.safe_dump(to_dict(config), sort_keys=False), highlight=False, markup=False)
        console.print(schedule(prepared.scenario, config))
        size, bytes_ = launch.cohort_size(config, prepared.layout), predict(prepared)
        console.print(f"scenario hash {prepared.scenario.hash}", highlight=False, soft_wrap=True)
        console.print(f"cohorts of {size} · adapter {prepared.layout.size(config.lora.rank):,} parameters per subspace")
        console.print(
            f"predicted bytes: up {human_bytes(bytes_.up)}, down {human_bytes(bytes_.down)}, "
            f"evaluation {human_bytes(bytes_.evaluation)}",
            highlight=False,
        )
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
    for round_ in range(1, config.federation.rounds_per_stage + 1):
        for position, client in enumerate(draw(config, scenario.client_count, stage + 1, round_)):
            found.setdefault(client, set()).update(scenario.tasks_of(stage, position))
    return found


def predict(prepared: launch.Prepared) -> Bytes:
    """What the run will move if every participant answers and every token is asked for once."""
    config, scenario, strategy = prepared.config, prepared.scenario, prepared.strategy()
    f, stages = config.federation, len(scenario.stages)
    trains = stages * f.rounds_per_stage * min(f.clients_per_round, scenario.client_count)
    adapter = 4 * prepared.layout.size(strategy.adapter_rank)
    token = 4 * prepared.description.dim if strategy.needs_tokens else 0
    keys = {(client, task) for s in range(stages) for client, t in _drawn(scenario, config, s).items() for task in t}
    tokens = token * len(keys)
    subspaces = len(strategy.knowledge().adapters)
    rows = [subspaces or min(row, len(scenario.tasks)) for row in range(stages + 1)]
    shards = len(cut(scenario, config.evaluate.split, config.evaluate.shard))
    return Bytes(trains * adapter + tokens, trains * adapter, shards * sum(rows) * (adapter + token))
