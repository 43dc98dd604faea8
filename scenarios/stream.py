"""What a scenario is made of: tasks, stages, who holds what, and when. Frozen, and a pure function of (file, seed)."""

import hashlib
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from fedstrata.scenarios.arrival import Timeline
from fedstrata.scenarios.example import Example, ImageSource, Pixels, image_word
from fedstrata.scenarios.partition import Indices, Shares
from fedstrata.scenarios.rows import Rows, rows_of
from fedstrata.scenarios.saved import save_partition

__all__ = ["Example", "ImageSource", "Pixels", "Scenario", "Task", "digest", "image_word"]

Assign = tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True)
class Task:
    """A named set of instructions with its metric (a name in `fedstrata.core.scoring.SCORERS`).

    Attributes:
        suffix: kept for the record: every question already ends with it.
        beside: further metrics that are reported beside `metric`.
        found: what loading found worth telling, for people.
        missing: pictures that are not there (`fedstrata preview` lists them; a run refuses them).
    """

    name: str
    train: Sequence[Example]
    test: Sequence[Example]
    val: Sequence[Example] = ()
    metric: str = "exact_match"
    suffix: str = ""
    beside: tuple[str, ...] = ()
    found: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @cached_property
    def training(self) -> Rows:
        """`train` with its marks."""
        return rows_of(self.train)


def digest(examples: Sequence[Example]) -> str:
    """SHA-256 over ids, texts and picture words, in order; the same on every machine."""
    return rows_of(examples).marks.digest


@dataclass(frozen=True, eq=False)
class Scenario:
    """Which data exists when, and for whom. Tasks and clients are counted from 0, stages and rounds from 1.

    Attributes:
        stages: the tasks that arrive at each stage; what a row of the accuracy matrix counts as seen.
        assign: heterogeneous: per stage, the tasks of the client at each position of a round's participants
            (position modulo length); None: what a participant trains depends on the client and the time alone.
        shares: `[task][client]` → ascending indices into the task's `train`: all that the client ever holds.
        timeline: which of it exists when.
        vocabularies: per task, the set of its answers; None where it is open-ended.
        beta: the partition's Dirichlet concentration; None where the partition has none.
        hash: SHA-256 of everything that decides the scenario: stages, partition, clients, seed and the examples.
        units: how many separate things are learned: tasks, or groups of tasks that always come together.
    """

    name: str
    tasks: tuple[Task, ...]
    stages: tuple[tuple[int, ...], ...]
    assign: Assign | None
    shares: tuple[Shares, ...]
    timeline: Timeline
    vocabularies: tuple[frozenset[str] | None, ...]
    beta: float | None
    seed: int
    hash: str
    units: int = 0

    @property
    def client_count(self) -> int:
        return len(self.shares[0])

    @property
    def stage_names(self) -> tuple[str, ...]:
        """For people: `1 names`, `2 charts+icons`, `3 charts+4 more`."""
        return tuple(f"{number} {self._label(stage)}" for number, stage in enumerate(self.stages, 1))

    def _label(self, stage: tuple[int, ...]) -> str:
        if len(stage) > 2:
            return f"{self.tasks[stage[0]].name}+{len(stage) - 1} more"
        return "+".join(self.tasks[task].name for task in stage)

    def tasks_of(self, stage: int, round_: int, position: int, client: int) -> tuple[int, ...]:
        """The tasks that this client trains in this round, when it is the participant at `position`; () when absent."""
        if self.assign is None:
            return self.timeline.tasks(client, stage, round_)
        positions = self.assign[stage - 1]
        return positions[position % len(positions)]

    def present(self, stage: int, round_: int) -> list[int]:
        """The clients that can be drawn in this round: those that are there and, but for places, have data to train."""
        epoch = self.timeline.epoch(stage, round_)
        if epoch not in self._presence:  # of many clients most rounds find the same ones
            self._presence.clear()
            there = range(self.client_count)
            self._presence[epoch] = tuple(client for client in there if self._can_train(client, stage, round_))
        return list(self._presence[epoch])

    @cached_property
    def _presence(self) -> dict[Hashable, tuple[int, ...]]:
        """The last epoch's answer of `present`."""
        return {}

    def _can_train(self, client: int, stage: int, round_: int) -> bool:
        tasks = self.timeline.tasks(client, stage, round_)
        if self.assign is not None:  # its place among the participants decides what it trains
            return bool(tasks)
        return any(len(self.timeline.rows(task, client, stage, round_)) for task in tasks)

    def holding(self, tasks: Iterable[int], client: int, stage: int = 0, round_: int = 0) -> list[tuple[int, Indices]]:
        """[(task, rows)] that the client has of these tasks at this time; stage 0: all that it ever has."""
        chosen = sorted(set(tasks))
        if not stage:
            return [(task, self.shares[task][client]) for task in chosen]
        return [(task, self.timeline.rows(task, client, stage, round_)) for task in chosen]

    def share(self, tasks: Iterable[int], client: int, stage: int = 0, round_: int = 0) -> list[tuple[int, int]]:
        """[(task, row)] of `holding`: by task, then in the task's own order."""
        held = self.holding(tasks, client, stage, round_)
        return [(task, int(row)) for task, rows in held for row in rows]

    def share_size(self, tasks: Iterable[int], client: int, stage: int = 0, round_: int = 0) -> int:
        """`len(share(...))` without collecting it."""
        return sum(len(rows) for _, rows in self.holding(tasks, client, stage, round_))

    def read(self, share: Iterable[tuple[int, int]]) -> list[Example]:
        """The examples of a share. Raises `BadInput` when a file has gone or was changed since."""
        return [self.tasks[task].training[row] for task, row in share]

    def seen(self, stages_done: int) -> tuple[bool, ...]:
        """Per task, whether the first `stages_done` stages trained it."""
        trained = {task for stage in self.stages[:stages_done] for task in stage}
        return tuple(task in trained for task in range(len(self.tasks)))

    def data_key(self, tasks: Iterable[int], client: int, stage: int = 0, round_: int = 0) -> str:
        """16 hex digits that change exactly when this client's data of these tasks does; reads no example."""
        sha = hashlib.sha256()
        for task, rows in self.holding(tasks, client, stage, round_):
            sha.update(f"{task}:{len(rows)}:".encode())
            sha.update(self.tasks[task].training.marks.content[np.asarray(rows)].astype("<u8").tobytes())
        return sha.hexdigest()[:16]

    def save_partition(self, path: Path) -> None:
        """Writes who holds which row, for `partition: {kind: file}`."""
        deals = zip(self.tasks, self.shares, strict=True)
        save_partition(path, {task.name: (task.training.marks.digest, shares) for task, shares in deals})

    def scored(self, task: int, split: str) -> list[tuple[int | None, int]]:
        """[(client that holds them, examples)] of a task's split; None: every client could score them."""
        return [(None, len(getattr(self.tasks[task], split)))]

    def vocabulary(self, task_index: int) -> frozenset[str] | None:
        """The task's answers: all that its generator can give, or all that its data files hold; None: open-ended."""
        return self.vocabularies[task_index]
