"""A client's own scenario file, seen with the server's eyes: tasks in the server's order, the shares of others empty.

So a client with a folder of its own trains and scores by the same code as one of a simulation.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedstrata.core.records import Holding
from fedstrata.scenarios.arrival import Timeline
from fedstrata.scenarios.building import assemble
from fedstrata.scenarios.definition import read
from fedstrata.scenarios.held import SPLITS
from fedstrata.scenarios.partition import Indices, PartitionRule
from fedstrata.scenarios.stream import Scenario, Task

FILE = "scenario.yaml"  # in a client's folder
_NONE = np.zeros(0, dtype=np.int64)


def open_own(folder: Path, names: Sequence[str], client: int, clients: int, seed: int, rounds: int) -> Scenario:
    """The scenario of a client's folder, all of whose rows are its own.

    Args:
        names: the server's tasks, in its order.
        client: which of the `clients` this one is.
        rounds: of a stage.

    Raises:
        BadInput: no such file, or a mistake in it or in its data.
    """
    path = folder / FILE
    own = assemble(path.stem, read(path, own=True), "", PartitionRule(kind="iid"), None, 1, seed, rounds, strict=True)
    return own_view(own, names, client, clients)


class OwnTimeline:
    """A client's own timeline in the numbers of the server; after its last stage it holds nothing."""

    def __init__(self, inner: Timeline, own: Sequence[int | None], client: int, stages: int) -> None:
        """own: the server's task → the client's own number for it; stages: how many its own file has."""
        self.inner, self.own, self.client, self.stages = inner, own, client, stages
        self._back = {mine: task for task, mine in enumerate(own) if mine is not None}

    def tasks(self, client: int, stage: int, round_: int) -> tuple[int, ...]:
        if client != self.client or stage > self.stages:
            return ()
        return tuple(self._back[task] for task in self.inner.tasks(0, stage, round_) if task in self._back)

    def rows(self, task: int, client: int, stage: int, round_: int) -> Indices:
        mine = self.own[task]
        there = client == self.client and stage <= self.stages and mine is not None
        return self.inner.rows(mine, 0, stage, round_) if there and mine is not None else _NONE

    def epoch(self, stage: int, round_: int) -> Hashable:
        return self.inner.epoch(min(stage, self.stages), round_)


def own_view(own: Scenario, names: Sequence[str], client: int, clients: int) -> Scenario:
    """A client's scenario (of one client) as the server numbers it; tasks that it does not know are empty."""
    known = {task.name: number for number, task in enumerate(own.tasks)}
    mine = [known.get(name) for name in names]
    hands = [_NONE if number is None else own.shares[number][0] for number in mine]
    return replace(
        own,
        tasks=tuple(Task(name, (), ()) if at is None else own.tasks[at] for name, at in zip(names, mine, strict=True)),
        assign=None,
        shares=tuple(tuple(hand if k == client else _NONE for k in range(clients)) for hand in hands),
        timeline=OwnTimeline(own.timeline, mine, client, len(own.stages)),
        vocabularies=tuple(None if at is None else own.vocabularies[at] for at in mine),
        beta=None,
        units=len(names),
    )


def holding_of(view: Scenario, client: int, rounds: int, word: Callable[[str], str]) -> Holding:
    """What a client tells of its view. rounds: of a stage; word: turns a name of data into one that tells nothing."""
    tasks = range(len(view.tasks))
    counts, keys = [], []
    for number in range(len(view.stages) * rounds):
        when = (number // rounds + 1, number % rounds + 1)
        now = view.timeline.tasks(client, *when)
        counts.append([view.share_size([task], client, *when) if task in now else 0 for task in tasks])
        keys.append([word(view.data_key([task], client, *when)) if task in now else "" for task in tasks])
    whole = [view.share_size([task], client) for task in tasks]
    names = [word(view.data_key([task], client)) for task in tasks]
    return Holding(counts, keys, whole, names, _splits(view))


def _splits(view: Scenario) -> dict[str, list[int]]:
    return {split: [len(getattr(task, split)) for task in view.tasks] for split in SPLITS}
