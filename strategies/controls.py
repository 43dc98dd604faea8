"""Controls around DISCO: what perfect and what blind routing would give.

`oracle` is told the tasks, trains one subspace per task and routes every input to its task's. Uses task identity: yes.
`random-route` trains as DISCO does and routes every input to one subspace drawn at random. Uses task identity: no.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord

from fedstrata.core.records import Knowledge
from fedstrata.core.seeds import generator
from fedstrata.strategies.base import Inputs, Participant, Parts, Router, Setup, Weights
from fedstrata.strategies.disco import Disco
from fedstrata.strategies.facts import Facts


class Oracle(Disco):
    """DISCO told the tasks: one subspace per task, routed by the task.

    A participant with several tasks at once trains the first one's subspace.
    """

    facts: ClassVar[Facts] = Facts(grows=1, plain={"subspaces": 1}, one_stage=True)
    uses_task_identity: ClassVar[bool] = True
    needs_tokens: ClassVar[bool] = False

    def __init__(self, options: Any, setup: Setup) -> None:
        super().__init__(options, setup)
        self.owners: tuple[int, ...] = ()  # the task of every subspace

    def meet(self, participants: Sequence[Participant]) -> None:
        self.participants = tuple(participants)
        self.owners = self.owners[: len(self.state.subspaces)]  # what an earlier round announced and nobody filled
        for task in dict.fromkeys(participant.tasks[0] for participant in participants if participant.tasks):
            if task not in self.owners:
                self.owners += (task,)
        self._placement = {p.partition: self.owners.index(p.tasks[0]) for p in participants if p.tasks}

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        result = super().aggregate_train(server_round, replies)
        tasks = {
            self._placement[p.partition]: p.tasks[0]
            for p in self.participants
            if p.partition in self._placement and p.tasks
        }
        filled = range(len(self.state.subspaces))
        self.owners = tuple(tasks[j] if j in tasks else self.owners[j] for j in filled)
        return result

    def knowledge(self) -> Knowledge:
        known = super().knowledge()
        return replace(known, options={**known.options, "owners": list(self.owners[: len(known.adapters)])})

    @classmethod
    def mixes(cls, options: Any) -> bool:
        return False

    @classmethod
    def router(cls, knowledge: Knowledge) -> Router:
        return ByTask(tuple(knowledge.options["owners"]))

    def save(self) -> Parts:
        parts = super().save()
        return replace(parts, facts={**parts.facts, "owners": list(self.owners[: len(self.state.subspaces)])})

    def load(self, parts: Parts) -> None:
        super().load(parts)
        self.owners = tuple(parts.facts["owners"])


@dataclass(frozen=True)
class ByTask:
    """Weight 1 on the subspace of the input's task; none where the task has no subspace yet."""

    owners: tuple[int, ...]
    needs_features: bool = False

    def weights(self, inputs: Inputs) -> Weights:
        rows = [[float(owner == task) for owner in self.owners] for task in inputs.tasks]
        return np.asarray(rows, dtype=np.float32).reshape(len(inputs.tasks), len(self.owners))


class RandomRoute(Disco):
    """DISCO's training, blind routing."""

    facts: ClassVar[Facts] = Facts(grows=1, plain={"subspaces": 1}, neutral={"tau": -1})

    def knowledge(self) -> Knowledge:
        known = super().knowledge()
        return replace(known, options={**known.options, "seed": self.setup.seed})

    @classmethod
    def mixes(cls, options: Any) -> bool:
        return False

    @classmethod
    def router(cls, knowledge: Knowledge) -> Router:
        return Blind(len(knowledge.adapters), int(knowledge.options["seed"]))


@dataclass(frozen=True)
class Blind:
    """Weight 1 on one subspace, drawn from (seed, task, example)."""

    adapters: int
    seed: int
    needs_features: bool = False

    def weights(self, inputs: Inputs) -> Weights:
        weights = np.zeros((len(inputs.ids), self.adapters), dtype=np.float32)
        for row, (task, example) in enumerate(zip(inputs.tasks, inputs.ids, strict=True)):
            if self.adapters:
                weights[row, generator(self.seed, "route", task, example).integers(self.adapters)] = 1.0
        return weights
