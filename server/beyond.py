"""What a run did to everything else: tasks that the base could do before, and tasks that were never trained.

Two columns of the paper's tables (general benchmarks after tuning, zero-shot on unseen tasks; arXiv 2503.12897). Scored
once, at a run's end, on the test split, with what a method starts from and with what it ends with; this traffic is not
in bytes_eval.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean

from fedstrata import scenarios
from fedstrata.core.config import RunConfig
from fedstrata.core.errors import BadInput
from fedstrata.scenarios.stream import Scenario
from fedstrata.server.federation import Federation
from fedstrata.server.preparing import on_the_wire
from fedstrata.server.scoring import TaskScore, ask, cut
from fedstrata.strategies.base import Strategy

COLUMNS = ("pretrained", "unseen")  # keys of `evaluate`


def check(config: RunConfig) -> None:
    """Raises `BadInput` for a scenario that cannot be scored: before a run begins, not at its end."""
    for column in COLUMNS:
        if getattr(config.evaluate, column):
            scenario = scenarios.of(_elsewhere(config, column))
            if not _foreign(scenario, scenarios.of(config)):
                raise BadInput(f"evaluate.{column}: {scenario.name} must have a task that the run's scenario has not")


def score(federation: Federation, fresh: Callable[[], Strategy]) -> dict[str, float | None]:
    """`<column>_before` and `<column>`: means over tasks, 0–100; None where the method routes by task identity.

    fresh: makes the strategy as it was before the first stage.
    """
    found: dict[str, float | None] = {}
    for column in COLUMNS:
        if getattr(federation.config.evaluate, column):
            there = copy.copy(federation)
            config = _elsewhere(federation.config, column)
            there.scenario, there.config_json = scenarios.of(config), json.dumps(on_the_wire(config))
            found[column] = _mean(there, federation.scenario)
            there.strategy = fresh()
            found[f"{column}_before"] = _mean(there, federation.scenario)
    return found


def _elsewhere(config: RunConfig, column: str) -> RunConfig:
    """The same run on the column's scenario, whose paths are its own."""
    scenario = replace(config.scenario, name=getattr(config.evaluate, column), root="", beta=None)
    return replace(config, scenario=scenario)


def _foreign(scenario: Scenario, own: Scenario) -> list[int]:
    names = {task.name for task in own.tasks}
    return [index for index, task in enumerate(scenario.tasks) if task.name not in names]


def _mean(there: Federation, own: Scenario) -> float | None:
    if "owners" in there.strategy.knowledge().options:
        return None
    foreign = _foreign(there.scenario, own)
    parts = [part for part in cut(there.scenario, "test", there.config.evaluate.shard) if part.shard.task in foreign]
    scores = {task: TaskScore() for task in foreign}
    replies, _ = ask(there, parts, len(there.progress.matrix.scores) - 1)
    for number, reply in sorted(replies.items()):
        scores[parts[number].shard.task].add(reply)
    return fmean(total.scores[there.scenario.tasks[task].metric] for task, total in scores.items())
