"""What a run did to everything else: tasks that the base could do before, and tasks that were never trained.

Two columns of the paper's tables (general benchmarks after tuning, zero-shot on unseen tasks; arXiv 2503.12897). Scored
once, at a run's end, on the test split, with the base and with what a method ends with; this traffic is not in
bytes_eval.
"""

import copy
import json
from dataclasses import replace
from statistics import fmean

from fedstrata import scenarios
from fedstrata.core.config import RunConfig
from fedstrata.core.errors import BadInput
from fedstrata.scenarios.stream import Scenario
from fedstrata.server.calibrate import plain
from fedstrata.server.federation import Federation
from fedstrata.server.preparing import on_the_wire
from fedstrata.server.scoring import TaskScore, ask, cut
from fedstrata.strategies.finetune import Finetune, FinetuneConfig

COLUMNS = ("pretrained", "unseen")  # keys of `evaluate`
_BASE: dict[str, float | None] = {}


def check(config: RunConfig) -> None:
    """Raises `BadInput` for a scenario that cannot be scored: before a run begins, not at its end."""
    for column in COLUMNS:
        if getattr(config.evaluate, column):
            scenario = scenarios.of(_elsewhere(config, column))
            if not _foreign(scenario, scenarios.of(config)):
                raise BadInput(f"evaluate.{column}: {scenario.name} must have a task that the run's scenario has not")


def score(federation: Federation) -> dict[str, float | None]:
    """`<column>_before`, of the base, and `<column>`, of what was learned: means over tasks, 0–100.

    None for what was learned by a method that routes by task identity.
    """
    found: dict[str, float | None] = {}
    for column in COLUMNS:
        if getattr(federation.config.evaluate, column):
            found[column] = _mean(_there(federation, _elsewhere(federation.config, column)), federation.scenario)
            found[f"{column}_before"] = _before(federation, _elsewhere(plain(federation.config), column))
    return found


def _there(federation: Federation, config: RunConfig) -> Federation:
    """The federation as it stands, with another scenario to be scored."""
    there = copy.copy(federation)
    there.scenario, there.config_json = scenarios.of(config), json.dumps(on_the_wire(config))
    return there


def _before(federation: Federation, config: RunConfig) -> float | None:
    """Of an adapter that nobody has trained, which is the base. Kept: the cells of a sweep share it.

    None where a method trains prompts, which are not nothing before they are trained.
    """
    if not isinstance(config.strategy, FinetuneConfig):
        return None
    there = _there(federation, config)
    there.strategy = Finetune(config.strategy, federation.strategy.setup)
    model, train = vars(config.model), (config.train.max_length, config.train.overlong)
    key = repr((federation.bound["base"], model, train, there.scenario.hash, sorted(_names(federation.scenario))))
    if key not in _BASE:
        _BASE[key] = _mean(there, federation.scenario)
    return _BASE[key]


def _elsewhere(config: RunConfig, column: str) -> RunConfig:
    """The same run on the column's scenario, whose paths are its own, and who holds what there as its file suggests."""
    name = getattr(config.evaluate, column)
    clients = scenarios.defaults(name).get("federation", {}).get("clients", config.federation.clients)
    federation = replace(config.federation, clients=clients, clients_per_round=1, min_replies=1)
    scenario = replace(config.scenario, name=name, root="", beta=None)
    return replace(config, scenario=scenario, federation=federation)


def _foreign(scenario: Scenario, own: Scenario) -> list[int]:
    return [index for index, task in enumerate(scenario.tasks) if task.name not in _names(own)]


def _names(scenario: Scenario) -> set[str]:
    return {task.name for task in scenario.tasks}


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
