"""When data becomes known to its clients: pure functions of (rule, stages, seed).

A client's own stage follows from its clock (`Clocked`: everybody's, or its own); which of its rows exist then follows
from the release (`Release`: early shares, fresh parts of tasks that recur). With a trace, a file says it all.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedstrata.core.config import require
from fedstrata.core.errors import BadInput, unknown
from fedstrata.core.seeds import generator
from fedstrata.scenarios.dealing import Indices, Shares
from fedstrata.scenarios.saved import sha256_of
from fedstrata.scenarios.trace import Traced, fresh_part, read_trace

LEAST = 3  # rounds of a run in which clients join late or leave early: those of both kinds have one between
KINDS = ("stages", "blurry", "asynchronous", "trace")
REPEATS = ("same", "fresh")
Stages = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class ArrivalRule:
    """A scenario file's `arrival` block.

    Attributes:
        kind: stages: all data of a stage at its beginning. blurry: a share of them one stage earlier. asynchronous:
            each client on its own clock. trace: a file says it.
        early: share of a client's rows of a task that arrives one stage before the task's own (blurry, asynchronous).
        repeats: a task that comes in several stages brings the same rows again, or each time a fresh equal part.
        lag: most rounds by which a client enters a stage late (asynchronous).
        late: share of the clients that join after the first round, in the first half of the run (asynchronous).
        leave: share of the clients that leave in the second half of the run (asynchronous).
        file: the trace, relative to the scenario file.
    """

    kind: str = "stages"
    early: float = 0.0
    repeats: str = "same"
    lag: int = 0
    late: float = 0.0
    leave: float = 0.0
    file: str = ""

    def __post_init__(self) -> None:
        for key, known in (("kind", KINDS), ("repeats", REPEATS)):
            if getattr(self, key) not in known:
                raise unknown(key, getattr(self, key), known)
        for key in ("early", "late", "leave"):
            require(0 <= getattr(self, key) < 1, key, "at least 0 and below 1", getattr(self, key))
        require(self.lag >= 0, "lag", "at least 0", self.lag)
        own = self.kind == "asynchronous"
        for key in ("lag", "late", "leave"):
            require(own or not getattr(self, key), key, "0 unless kind is asynchronous", getattr(self, key))
        require(own or self.kind == "blurry" or not self.early, "early", "0 with this kind", self.early)
        require(self.kind != "blurry" or self.early > 0, "early", "above 0 with kind blurry", self.early)
        require((self.kind == "trace") == bool(self.file), "file", "there with kind: trace, and only then", self.file)


class Timeline(Protocol):
    """What each client holds at each time. Stages and rounds within them are counted from 1."""

    def tasks(self, client: int, stage: int, round_: int) -> tuple[int, ...]:
        """The tasks whose data the client trains in this round; () while it is absent."""

    def rows(self, task: int, client: int, stage: int, round_: int) -> Indices:
        """The client's rows of the task that exist in this round, ascending."""

    def epoch(self, stage: int, round_: int) -> Hashable:
        """Equal for rounds in which every client holds the same."""


def timeline(
    rule: ArrivalRule, stages: Stages, shares: Sequence[Shares], rounds: int, seed: int, names: Sequence[str], at: Path
) -> Timeline:
    """The timeline of a rule. `rounds`: of a stage; `names`: of the tasks; `at`: the scenario file's folder.

    Raises:
        BadInput: a lag as long as a stage, too short a run for late or leave, a round without any client, or a
            mistake in the trace.
    """
    clients = len(shares[0])
    if rule.kind == "trace":
        trace = read_trace(at / rule.file, clients, len(stages) * rounds, names)
        return Traced(trace, shares, rounds, rule.repeats == "fresh", seed)
    release = Release(stages, shares, rule, seed)
    if rule.kind == "asynchronous":
        return Clocked(_clocks(rule, len(stages), clients, rounds, seed), release, rounds)
    return Clocked(np.repeat(np.arange(1, len(stages) + 1), rounds)[None], release, rounds)


def describe(rule: ArrivalRule, at: Path = Path()) -> dict[str, Any]:
    """What the scenario's hash says of the rule: keys added later count only when they differ from their default."""
    told: dict[str, Any] = {"kind": rule.kind}
    keys = ("early", "repeats", "lag", "late", "leave")
    told |= {key: value for key in keys if (value := getattr(rule, key)) != getattr(ArrivalRule, key)}
    return told | ({"file": sha256_of(at / rule.file)} if rule.file else {})


class Release:
    """Which of a client's rows of a task exist in a stage (its own stage, when it has a clock of its own)."""

    def __init__(self, stages: Stages, shares: Sequence[Shares], rule: ArrivalRule, seed: int) -> None:
        self.stages, self.shares, self.rule, self.seed = stages, shares, rule, seed
        self._occurs = [[number for number, s in enumerate(stages, 1) if task in s] for task in range(len(shares))]
        self._known: dict[tuple[int, int, int], Indices] = {}
        self._next = [self._announced(number) for number in range(len(stages) + 1)]

    def tasks(self, client: int, stage: int) -> tuple[int, ...]:
        """The stage's own tasks, then those of the next stage of which the client has early rows."""
        here, coming = self.stages[stage - 1], self._next[stage]
        return (*here, *(task for task in coming if self._early(task, client, stage + 1))) if coming else here

    def rows(self, task: int, client: int, stage: int) -> Indices:
        """Ascending; what was released for the stage and, early, for the next one."""
        if self.rule.repeats == "same" and not self.rule.early:
            return self.shares[task][client]
        key = (task, client, stage)
        if key not in self._known:
            here = [self._part(task, client, stage, late=True), self._part(task, client, stage + 1, late=False)]
            self._known[key] = np.unique(np.concatenate(here))
        return self._known[key]

    def _announced(self, stage: int) -> tuple[int, ...]:
        """Tasks of the next stage that are not in this one."""
        if not self.rule.early or not 0 < stage < len(self.stages):
            return ()
        return tuple(task for task in self.stages[stage] if task not in self.stages[stage - 1])

    def _early(self, task: int, client: int, stage: int) -> int:
        """How many rows of the occurrence come one stage before it; draws nothing."""
        rows, occurs = len(self.shares[task][client]), self._occurs[task]
        if self.rule.repeats == "fresh":
            rows = rows // len(occurs) + (occurs.index(stage) < rows % len(occurs))
        return math.floor(self.rule.early * rows + 1e-9) if stage > 1 else 0  # 0.29 · 100 is a little below 29

    def _part(self, task: int, client: int, stage: int, late: bool) -> Indices:
        """The occurrence's rows that come in its own stage (late), or one stage before."""
        occurs = self._occurs[task]
        if stage not in occurs:
            return np.zeros(0, dtype=np.int64)
        rows, first = self.shares[task][client], self._early(task, client, stage)
        if self.rule.repeats == "fresh":
            rows = fresh_part(rows, len(occurs), occurs.index(stage), self.seed, task, client)
        if not first:
            return rows if late else rows[:0]
        order = generator(self.seed, "arrival", "early", task, client, stage).permutation(len(rows))
        return rows[order[first:] if late else order[:first]]


class Clocked:
    """A timeline from clocks: `own` [clients or 1, all rounds] is the client's own stage, 0 while it is absent."""

    def __init__(self, own: Indices, release: Release, rounds: int) -> None:
        self.release, self.rounds = release, rounds
        self._own: list[list[int]] = own.tolist()

    def stage_of(self, client: int, stage: int, round_: int) -> int:
        """The client's own stage; 0 while it is absent."""
        clocks = self._own[client if len(self._own) > 1 else 0]
        return clocks[(stage - 1) * self.rounds + round_ - 1]

    def tasks(self, client: int, stage: int, round_: int) -> tuple[int, ...]:
        own = self.stage_of(client, stage, round_)
        return self.release.tasks(client, own) if own else ()

    def rows(self, task: int, client: int, stage: int, round_: int) -> Indices:
        own = self.stage_of(client, stage, round_)
        return self.release.rows(task, client, own) if own else np.zeros(0, dtype=np.int64)

    def epoch(self, stage: int, round_: int) -> Hashable:
        return tuple(clocks[(stage - 1) * self.rounds + round_ - 1] for clocks in self._own)


def _clocks(rule: ArrivalRule, stages: int, clients: int, rounds: int, seed: int) -> Indices:
    """[clients, stages · rounds]: each client's own stage, 0 while it is absent."""
    if rule.lag >= rounds:
        raise BadInput(f"lag: must be below federation.rounds_per_stage ({rounds}), got {rule.lag}")
    total = stages * rounds
    if (rule.late or rule.leave) and total < LEAST:
        raise BadInput(f"late and leave: must be 0 in a run of fewer than {LEAST} rounds, got a run of {total}")
    half = max(2, total // 2)
    joins = _drawn("late", rule.late, clients, (1, half), 0, seed)
    leaves = _drawn("leave", rule.leave, clients, (half, total), total, seed)
    begins, now = np.arange(stages) * rounds, np.arange(total)
    lags = generator(seed, "arrival", "lag").integers(0, rule.lag + 1, size=(clients, stages))
    lags[begins <= joins[:, None]] = 0  # who joins begins with the stage of that round
    own: Indices = (now[None, :, None] >= (begins + lags)[:, None, :]).sum(axis=2)
    own[(now < joins[:, None]) | (now >= leaves[:, None])] = 0
    empty = np.flatnonzero((own == 0).all(axis=0))
    if len(empty):
        raise BadInput(f"late and leave: no client is present in round {int(empty[0]) + 1} of the run; lower them")
    return own


def _drawn(name: str, share: float, clients: int, span: tuple[int, int], other: int, seed: int) -> Indices:
    """Per client a round, counted from 0: one of `span` for a seeded share of the clients, `other` for the rest."""
    found = np.full(clients, other, dtype=np.int64)
    chosen = generator(seed, "arrival", name, "who").choice(clients, round(share * clients), replace=False)
    if len(chosen):
        found[chosen] = generator(seed, "arrival", name, "when").integers(*span, size=len(chosen))
    return found
