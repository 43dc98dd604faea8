"""What a scenario is, before any model is loaded: who holds what when, how much it is, and what is wrong with it."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fedstrata import scenarios
from fedstrata.core import shapes
from fedstrata.core.config import RunConfig
from fedstrata.core.errors import BadInput
from fedstrata.scenarios.rows import Rows, rows_of
from fedstrata.scenarios.stream import Scenario, Task
from fedstrata.server.holdings import Cell, holdings
from fedstrata.server.participation import Visit, visits
from fedstrata.server.plan import Bytes, predict
from fedstrata.strategies import find
from fedstrata.strategies.base import Setup

SAMPLED = 1000  # rows of a split whose tokens are counted, spread over it
SHOWN = 12  # labels of a histogram
PERCENTILES = (50, 90, 99, 100)


@dataclass(frozen=True)
class TaskFacts:
    """A task's sizes. `labels`: its commonest answers, then how many rows have another one.

    `tokens`: text tokens of question and answer at the percentiles 50, 90, 99 and 100; None without a tokenizer.
    `twice`: test rows whose (picture, question) is in train too.
    """

    name: str
    train: int
    val: int
    test: int
    metrics: tuple[str, ...]
    answers: int
    labels: tuple[tuple[str, int], ...]
    others: int
    tokens: tuple[int, ...] | None
    missing: tuple[str, ...]
    twice: int
    found: tuple[str, ...]


@dataclass(frozen=True)
class Preview:
    """Everything `fedstrata preview` shows; `steps`: optimiser steps of all client-rounds; `bytes` may be unknown."""

    scenario: str
    hash: str
    seed: int
    stages: tuple[str, ...]
    tasks: tuple[TaskFacts, ...]
    clients: tuple[tuple[Cell, ...], ...]
    schedule: tuple[Visit, ...]
    client_rounds: int
    steps: int
    bytes: Bytes | None
    unknown: str
    task_names: tuple[str, ...]

    def json(self) -> dict[str, Any]:
        """As plain values; a schedule entry names its tasks."""
        tree = asdict(self)
        tree["schedule"] = [
            {**asdict(visit), "tasks": [self.task_names[task] for task in visit.tasks]} for visit in self.schedule
        ]
        return {"version": 1, **tree}

    @property
    def warnings(self) -> list[str]:
        """One line for each thing that a run would refuse or that skews its scores."""
        lines = [
            f"{task.name}: {len(task.missing)} pictures are missing: {', '.join(task.missing[:3])}"
            for task in self.tasks
            if task.missing
        ]
        lines += [
            f"{task.name}: {task.twice} test rows are in train too (same picture, same question)"
            for task in self.tasks
            if task.twice
        ]
        held = [sum(cell.samples for cell in row) for row in self.clients]
        idle = [str(client) for client, total in enumerate(held) if not total]
        return lines + ([f"{len(idle)} clients never hold data: {', '.join(idle[:8])}"] if idle else [])


def preview(config: RunConfig) -> tuple[Preview, Scenario]:
    """Reads the scenario's data; loads no model, only its tokenizer and its shapes where they are at hand.

    Raises:
        BadInput: whatever `run` would refuse, but for missing pictures, which are listed.
    """
    scenario = scenarios.of(config, strict=False)
    plan = [visit for stage in range(1, len(scenario.stages) + 1) for visit in visits(config, scenario, stage)]
    sizes, unknown = _bytes(config, scenario)
    told = Preview(
        scenario=scenario.name,
        hash=scenario.hash,
        seed=config.seed,
        stages=scenario.stage_names,
        tasks=tuple(_task(task, scenario, index, config) for index, task in enumerate(scenario.tasks)),
        clients=holdings(scenario, plan),
        schedule=tuple(plan),
        client_rounds=len(plan),
        steps=sum(_steps(scenario.share_size(v.tasks, v.client, v.stage, v.round), config) for v in plan),
        bytes=sizes,
        unknown=unknown,
        task_names=tuple(task.name for task in scenario.tasks),
    )
    return told, scenario


def _task(task: Task, scenario: Scenario, index: int, config: RunConfig) -> TaskFacts:
    train, test = task.training, rows_of(task.test)
    codes, first, counts = np.unique(train.marks.answer, return_index=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:SHOWN]
    labels = tuple((train[int(first[place])].answer, int(counts[place])) for place in order)
    return TaskFacts(
        name=task.name,
        train=len(train),
        val=len(task.val),
        test=len(test),
        metrics=(task.metric, *task.beside),
        answers=len(codes),
        labels=labels,
        others=len(train) - sum(count for _, count in labels),
        tokens=_tokens(train, config),
        missing=task.missing,
        twice=int(np.isin(test.marks.asked, train.marks.asked).sum()),
        found=task.found,
    )


def _tokens(rows: Rows, config: RunConfig) -> tuple[int, ...] | None:
    """Percentiles over a sample of the rows."""
    tokenizer = shapes.tokenizer(config.model.name)
    if tokenizer is None:
        return None
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), SAMPLED)).astype(int))
    texts = [_text(rows, int(row)) for row in chosen]
    lengths = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    return tuple(int(value) for value in np.percentile(lengths, PERCENTILES, method="higher"))


def _text(rows: Rows, row: int) -> str:
    example = rows[row]
    return " ".join((example.question, example.answer, *(text for turn in example.more for text in turn)))


def _steps(samples: int, config: RunConfig) -> int:
    return -(-samples // config.train.batch_size) * config.train.local_epochs


def _bytes(config: RunConfig, scenario: Scenario) -> tuple[Bytes | None, str]:
    """(bytes, why they are unknown)."""
    method = find(config.strategy.name)
    try:
        layout = shapes.layout(config)
        dim = shapes.token_dim(config) if method.needs_tokens else 0
    except BadInput as error:
        return None, str(error)
    told = Setup(config.seed, layout, config.lora.rank, scenario.units, 0.0, 1.0)
    return predict(config, scenario, method(config.strategy, told), layout, dim), ""
