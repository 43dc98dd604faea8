"""`fedstrata run --dry-run`: the resolved config, who trains what when, and the bytes it will take. Trains nothing."""

from dataclasses import dataclass, replace

import yaml
from rich.console import Console

from fedstrata.core.adapters import Layout
from fedstrata.core.config import RunConfig, to_dict
from fedstrata.scenarios.stream import Scenario
from fedstrata.server import preparing
from fedstrata.server.holdings import client_table, holdings
from fedstrata.server.participation import visits
from fedstrata.server.report import human_bytes
from fedstrata.server.scoring import cut
from fedstrata.strategies.base import Strategy


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
    prepared = preparing.prepare(local)
    try:
        text = yaml.safe_dump(to_dict(config), sort_keys=False)
        console.print(text, highlight=False, markup=False, soft_wrap=True)
        scenario = prepared.scenario
        plan = [visit for stage in range(1, len(scenario.stages) + 1) for visit in visits(config, scenario, stage)]
        console.print(client_table(scenario.stage_names, holdings(scenario, plan)))
        size = preparing.cohort_size(config, prepared.layout)
        told = prepared.description.dim
        bytes_ = predict(config, prepared.scenario, prepared.strategy(), prepared.layout, told)
        console.print(f"scenario hash {prepared.scenario.hash}", highlight=False, soft_wrap=True)
        console.print(f"cohorts of {size} · adapter {prepared.layout.size(config.lora.rank):,} parameters per subspace")
        for name, count in (("up", bytes_.up), ("down", bytes_.down), ("evaluation", bytes_.evaluation)):
            console.print(f"predicted bytes {name}: {count:,} ({human_bytes(count)})", highlight=False)
    finally:
        prepared.close()


def predict(config: RunConfig, scenario: Scenario, strategy: Strategy, layout: Layout, dim: int) -> Bytes:
    """What the run will move if every participant trains and answers; a client's token is asked for once per data.

    dim: length of an identity token.
    """
    numbers = range(1, len(scenario.stages) + 1)
    stages = [list(visits(config, scenario, stage, strategy.pooled)) for stage in numbers]
    trains = sum(map(len, stages))
    adapter, tail = 4 * layout.lora.size(strategy.adapter_rank), 4 * layout.tail  # a shared tail travels once
    token = 4 * dim if strategy.needs_tokens else 0
    asked = {(v.client, scenario.data_key(v.tasks, v.client, v.stage, v.round)) for stage in stages for v in stage}
    known = len(strategy.knowledge().adapters)
    seen = [{task for stage in stages[:row] for visit in stage for task in visit.tasks} for row in (0, *numbers)]
    adapters = sum(known or len(tasks) for tasks in seen)
    shards = len(cut(scenario, config.evaluate.split, config.evaluate.shard))
    scored = shards * (adapters * (adapter + token) + len(seen) * tail)
    return Bytes(trains * (adapter + tail) + token * len(asked), trains * (adapter + tail), scored)
