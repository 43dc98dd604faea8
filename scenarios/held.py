"""Data that clients hold in folders of their own, as far as the server knows of them.

Its scenario names tasks and stages (`tasks: {name: {held: clients}}`); counts come from the clients.
"""

import hashlib
import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedstrata.core.errors import BadInput
from fedstrata.core.records import Holding
from fedstrata.scenarios.definition import Definition, HeldTask
from fedstrata.scenarios.example import Example
from fedstrata.scenarios.partition import Indices
from fedstrata.scenarios.stream import Scenario, Task

SPLITS = ("test", "val")
_NONE = np.zeros(0, dtype=np.int64)


class Told:
    """A timeline of what clients told; who told nothing is absent."""

    def __init__(self, rounds: int) -> None:
        """rounds: of a stage."""
        self.rounds, self.holdings, self._told = rounds, dict[int, Holding](), 0

    def tell(self, client: int, holding: Holding | None) -> None:
        """What a client says from now on; None: it left."""
        self._told += 1
        self.holdings.pop(client, None)
        if holding is not None:
            self.holdings[client] = holding

    def at(self, client: int, stage: int, round_: int) -> int:
        """The round of the run, counted from 0; -1 where the client knows of none."""
        number = (stage - 1) * self.rounds + round_ - 1
        return number if client in self.holdings and number < len(self.holdings[client].rounds) else -1

    def tasks(self, client: int, stage: int, round_: int) -> tuple[int, ...]:
        number = self.at(client, stage, round_)
        counts = self.holdings[client].rounds[number] if number >= 0 else []
        return tuple(task for task, count in enumerate(counts) if count)

    def rows(self, task: int, client: int, stage: int, round_: int) -> Indices:
        number = self.at(client, stage, round_)
        return np.arange(self.holdings[client].rounds[number][task]) if number >= 0 else _NONE

    def epoch(self, stage: int, round_: int) -> Hashable:
        return self._told, stage, round_


@dataclass(frozen=True, eq=False)
class HeldScenario(Scenario):
    """The server's scenario of a deployment. It holds no example; `told` is filled as clients come and go."""

    told: Told = field(default_factory=lambda: Told(1))

    def holding(self, tasks: Iterable[int], client: int, stage: int = 0, round_: int = 0) -> list[tuple[int, Indices]]:
        if stage or client not in self.told.holdings:
            return super().holding(tasks, client, stage, round_)
        whole = self.told.holdings[client].whole
        return [(task, np.arange(whole[task])) for task in sorted(set(tasks))]

    def read(self, share: Iterable[tuple[int, int]]) -> list[Example]:
        raise BadInput(f"scenario {self.name}: the clients hold the data; the server has none of them")

    def data_key(self, tasks: Iterable[int], client: int, stage: int = 0, round_: int = 0) -> str:
        """From the client's own words for its data."""
        held, number = self.told.holdings.get(client), self.told.at(client, stage, round_) if stage else 0
        if held is None or number < 0:
            return ""
        words = held.keys[number] if stage else held.whole_keys
        return hashlib.sha256(" ".join(words[task] for task in sorted(set(tasks))).encode()).hexdigest()[:16]

    def scored(self, task: int, split: str) -> list[tuple[int | None, int]]:
        counts = [(client, held.splits[split][task]) for client, held in sorted(self.told.holdings.items())]
        return [(client, count) for client, count in counts if count]


def plan(name: str, definition: Definition, clients: int, seed: int, rounds: int) -> HeldScenario:
    """The server's scenario before any client told of itself. Its hash is of tasks, metrics and stages."""
    specs = {name: spec for name, spec in definition.tasks.items() if isinstance(spec, HeldTask)}
    tasks = tuple(Task(name, (), (), (), spec.metric, beside=tuple(spec.beside)) for name, spec in specs.items())
    content = {
        "held": "clients",
        "tasks": [[task.name, task.metric, *task.beside] for task in tasks],
        "stages": definition.stages,
        "seed": seed,
    }
    return HeldScenario(
        name=name,
        tasks=tasks,
        stages=definition.stages,
        assign=None,
        shares=tuple((_NONE,) * clients for _ in tasks),
        timeline=(told := Told(rounds)),
        vocabularies=(None,) * len(tasks),
        beta=None,
        seed=seed,
        hash=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
        units=len(tasks),
        told=told,
    )


def check_holding(holding: Holding, tasks: int, most: int) -> None:
    """Raises ValueError unless it is of so many tasks, with words and whole numbers from 0 to `most`."""
    lists: Mapping[str, Sequence[Sequence[object]]] = {
        "rounds": [*holding.rounds, holding.whole, *holding.splits.values()],
        "keys": [*holding.keys, holding.whole_keys],
    }
    if len(holding.keys) != len(holding.rounds) or set(holding.splits) != set(SPLITS):
        raise ValueError("holding: must have keys for every round, and the splits test and val")
    for name, kind in (("rounds", int), ("keys", str)):
        if not all(len(row) == tasks and all(type(item) is kind for item in row) for row in lists[name]):
            raise ValueError(f"holding: {name} must have one {kind.__name__} for each of {tasks} tasks")
    counts = [int(str(count)) for row in lists["rounds"] for count in row]
    if min(counts, default=0) < 0:
        raise ValueError("holding: counts must not be negative")
    if max(counts, default=0) > most:
        raise ValueError(f"holding: counts must be at most federation.max_samples ({most}), got {max(counts)}")
