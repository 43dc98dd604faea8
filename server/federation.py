"""The federation loop: the page that everybody reads first.

For each stage, begin_stage; for each round, two gated exchanges; end_stage; score all tasks; append a row to the
accuracy matrix. The loop is ours because Flower's `Strategy.start` counts from round 1 and has no checkpoint; it calls
a Flower strategy's own `configure_train` / `aggregate_train`, so any Flower strategy runs in it. A round is a pure
function of (seed, stage, round, state); every round ends in one commit.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedstrata.core import records
from fedstrata.core.config import RunConfig
from fedstrata.core.errors import FedstrataError
from fedstrata.core.identity import Token, cosine
from fedstrata.core.records import Assignment, Binding, TrainReply
from fedstrata.core.seeds import generator
from fedstrata.core.tracking import Tracker
from fedstrata.scenarios.stream import Scenario
from fedstrata.server import checkpoint
from fedstrata.server.display import Display
from fedstrata.server.exchange import Ledger, Seat, exchange, questions
from fedstrata.server.gate import Expected, read_token, read_train
from fedstrata.server.grids import ParticipantsGrid
from fedstrata.server.progress import Progress
from fedstrata.server.scoring import score_row
from fedstrata.strategies.base import Participant, Strategy

T = TypeVar("T")


class Federation:
    """One run: what it is made of, and where it stands."""

    def __init__(
        self,
        config: RunConfig,
        config_json: str,
        run_id: str,
        scenario: Scenario,
        strategy: Strategy,
        grid: Grid,
        roster: Mapping[int, int],
        folder: Path,
        tracker: Tracker,
        display: Display,
        progress: Progress,
        dim: int,
    ) -> None:
        self.config, self.config_json, self.run_id = config, config_json, run_id
        self.scenario, self.strategy, self.grid, self.roster = scenario, strategy, grid, roster
        self.folder, self.tracker, self.display = folder, tracker, display
        self.progress, self.dim = progress, dim
        self.rounds = config.federation.rounds_per_stage
        self._tokens: dict[tuple[int, str], Token] = {}  # (client, hash of its data) → token, asked for once
        self._near: list[float] = []  # this stage's cosines between participants' tokens and their subspaces'

    def run(self) -> Progress:
        """Runs what is left of the scenario."""
        if not self.progress.matrix.scores:
            self._score(stage=0)
        for stage in range(self.progress.stage, len(self.scenario.stages) + 1):
            self.strategy.begin_stage(stage)
            self._announce(stage)
            for round_ in range(self.progress.round, self.rounds + 1):
                self._round(stage, round_)
            self.strategy.end_stage(stage)
            self._score(stage)
        return self.progress

    def _round(self, stage: int, round_: int) -> None:
        """query.identify → gate → match, then train → gate → aggregate → commit."""
        began, ledger = time.perf_counter(), Ledger()
        seats = self._sample(stage, round_)
        participants = self._identify(seats, ledger)
        known = len(self.strategy.knowledge().adapters)
        self.strategy.meet(participants)
        messages = self._configure(stage, round_, participants)
        placed = [seat for seat in seats if seat.node in {message.metadata.dst_node_id for message in messages}]
        replies = self._train(placed, messages, ledger)
        skipped = len(replies) < self.config.federation.min_replies
        if not skipped:
            self.strategy.aggregate_train(self._number(stage, round_), [message for message, _ in replies])
        self._check_failures(ledger)
        good = {seat.partition: seat for seat in placed}
        done = [(good[reply.binding.partition], reply) for _, reply in replies] if not skipped else []
        self._book(stage, round_, done, ledger, skipped, time.perf_counter() - began)
        self._report(stage, round_, done, ledger, skipped, known, time.perf_counter() - began)
        self._commit()

    def _sample(self, stage: int, round_: int) -> list[Seat]:
        """This round's participants, drawn from (seed, stage, round); a client without data has no seat."""
        drawn = draw(self.config, len(self.roster), stage, round_)
        seats = [self._seat(stage, round_, position, client) for position, client in enumerate(drawn)]
        return [seat for seat in seats if seat.samples > 0]

    def _seat(self, stage: int, round_: int, position: int, client: int) -> Seat:
        scenario = self.scenario
        tasks = scenario.tasks_of(stage - 1, position)
        part, parts = 0, 1
        if self.strategy.pooled:
            tasks, parts = tuple(range(len(scenario.tasks))), len(scenario.stages)
            part = visits(self.config, len(self.roster), stage, round_)[client]
        binding = Binding(self.run_id, stage, round_, client)
        layout = self.strategy.setup.layout.hash
        assignment = Assignment(binding, tasks, part, parts, self.config_json, layout)
        samples = share_size(scenario.share_size(tasks, client), part, parts)
        return Seat(self.roster[client], assignment, samples)

    def _identify(self, seats: Sequence[Seat], ledger: Ledger) -> list[Participant]:
        """Participants with what the method asks for; tokens are cached until a client's data change."""
        if self.strategy.needs_tokens and not self.strategy.uses_task_identity:
            asked = [seat for seat in seats if self._data(seat) not in self._tokens]
            for message, token in self._exchange(
                asked, questions(asked, records.IDENTIFY), self.dim, read_token, ledger
            ):
                seat = next(s for s in asked if s.partition == records.binding(message).partition)
                self._tokens[self._data(seat)] = token
            known = [(seat, self._tokens.get(self._data(seat))) for seat in seats]
            return [Participant(s.node, s.partition, token) for s, token in known if token is not None]
        told = self.strategy.uses_task_identity
        return [Participant(s.node, s.partition, None, s.assignment.tasks if told else None) for s in seats]

    def _configure(self, stage: int, round_: int, participants: Sequence[Participant]) -> list[Message]:
        view = ParticipantsGrid(self.grid, [participant.node for participant in participants])
        number = self._number(stage, round_)
        return list(self.strategy.configure_train(number, ArrayRecord(), ConfigRecord(), view)) if participants else []

    def _train(
        self, seats: Sequence[Seat], messages: Sequence[Message], ledger: Ledger
    ) -> list[tuple[Message, TrainReply]]:
        size = self.strategy.setup.layout.size(self.strategy.adapter_rank)
        return self._exchange(seats, messages, size, read_train, ledger)

    def _exchange(
        self,
        seats: Sequence[Seat],
        messages: Sequence[Message],
        size: int,
        read: Callable[[Message, Expected], T],
        ledger: Ledger,
    ) -> list[tuple[Message, T]]:
        timeout = self.config.federation.timeout
        return exchange(self.grid, seats, messages, size, read, ledger, timeout) if messages else []

    def _data(self, seat: Seat) -> tuple[int, str]:
        return seat.partition, self.scenario.data_key(seat.assignment.tasks, seat.partition)

    def _number(self, stage: int, round_: int) -> int:
        """Flower's server_round: rounds counted through the whole run."""
        return (stage - 1) * self.rounds + round_

    def _check_failures(self, ledger: Ledger) -> None:
        limit = self.config.federation.max_failures
        if limit is not None and len(ledger.rejected) > limit:
            reasons = "; ".join(f"client {bad.partition}: {bad.reason}" for bad in ledger.rejected)
            raise FedstrataError(
                f"federation.max_failures = {limit}, but this round had {len(ledger.rejected)}: {reasons}"
            )

    def _book(
        self,
        stage: int,
        round_: int,
        done: Sequence[tuple[Seat, TrainReply]],
        ledger: Ledger,
        skipped: bool,
        wall: float,
    ) -> None:
        """Moves the progress past this round."""
        progress = self.progress
        for seat, _ in done:
            subspace = self.strategy.placement().get(seat.partition, 0)
            progress = progress.count_trained(self._counts(seat), subspace)
        seconds = sum(reply.seconds for _, reply in done)
        self.progress = replace(
            progress,
            stage=stage,
            round=round_ + 1,
            bytes_up=progress.bytes_up + ledger.up,
            bytes_down=progress.bytes_down + ledger.down,
            skipped_rounds=progress.skipped_rounds + skipped,
            train_seconds=progress.train_seconds + seconds,
            wall_seconds=progress.wall_seconds + wall,
        )

    def _counts(self, seat: Seat) -> dict[int, int]:
        """{task: instructions} of a seat's share; a draw from pooled data is counted by the pool's proportions."""
        tasks, parts = seat.assignment.tasks, seat.assignment.parts
        return {task: self.scenario.share_size([task], seat.partition) // parts for task in tasks}

    def _report(
        self,
        stage: int,
        round_: int,
        done: Sequence[tuple[Seat, TrainReply]],
        ledger: Ledger,
        skipped: bool,
        known: int,
        wall: float,
    ) -> None:
        """Tells tracker and display what happened in the round."""
        rows = [self._row(seat, reply) for seat, reply in done]
        total = sum(row["samples"] for row in rows)
        loss = sum(row["loss"] * row["samples"] for row in rows) / total if total else None
        for bad in ledger.rejected:
            self.tracker.event("rejected", stage=stage, round=round_, client=bad.partition, reason=bad.reason)
        self.tracker.event(
            "round",
            stage=stage,
            round=round_,
            participants=rows,
            loss=loss,
            bytes_up=ledger.up,
            bytes_down=ledger.down,
            seconds=wall,
            train_seconds=sum(reply.seconds for _, reply in done),
            opened=list(range(known, len(self.strategy.knowledge().adapters))),
            skipped=skipped,
        )
        self.display.round(stage, round_, [row["client"] for row in rows], loss, len(ledger.rejected), skipped)

    def _row(self, seat: Seat, reply: TrainReply) -> dict[str, Any]:
        """One participant of a `round` event."""
        subspace = self.strategy.placement().get(seat.partition, 0)
        token = self._tokens.get(self._data(seat)) if self._tokens else None
        tokens = self.strategy.knowledge().tokens
        if token is not None and subspace < len(tokens):
            self._near.append(cosine(token.value, tokens[subspace]))
        tasks = [self.scenario.tasks[task].name for task in seat.assignment.tasks]
        row = {"client": seat.partition, "tasks": tasks, "subspace": subspace}
        return {**row, "samples": reply.count, "steps": reply.steps, "loss": reply.loss}

    def _announce(self, stage: int) -> None:
        names = [self.scenario.tasks[task].name for task in self.scenario.stages[stage - 1]]
        self._near = []
        self.tracker.event("stage_started", stage=stage, tasks=names)
        self.display.stage(stage, names)

    def _score(self, stage: int) -> None:
        """Appends the row of `stage` (0: before training) to the accuracy matrix and commits."""
        began = time.perf_counter()
        tokens = self.strategy.knowledge().tokens
        between = [cosine(tokens[i], tokens[j]) for i in range(len(tokens)) for j in range(i)]
        self.progress, routing = score_row(self, stage)
        seconds = time.perf_counter() - began
        self.progress = replace(
            self.progress, stage=stage + 1, round=1, wall_seconds=self.progress.wall_seconds + seconds
        )
        matrix = self.progress.matrix
        self.tracker.event(
            "stage_scored",
            stage=stage,
            scores=matrix.final,
            vocabulary=dict(zip(matrix.tasks, matrix.vocabulary[-1], strict=True)),
            routing=routing,
            cosines={"within": self._near, "between": between},
            bytes_eval=self.progress.bytes_eval,
            seconds=seconds,
        )
        self.display.scored(stage, matrix)
        self._commit(keep=True)

    def _commit(self, keep: bool = False) -> None:
        self.progress = replace(self.progress, commits=self.progress.commits + 1)
        parts, number = self.strategy.save(), self.progress.commits
        commit = checkpoint.Commit(parts, self.progress.to_json(), number)
        checkpoint.write(self.folder / "checkpoints", commit, keep)
        matrix = json.dumps(self.progress.matrix.to_json(), indent=1).encode()
        checkpoint.write_atomic(self.folder / "matrix.json", matrix)


def draw(config: RunConfig, clients: int, stage: int, round_: int) -> list[int]:
    """The round's participants in the order of their positions: a pure function of (seed, stage, round)."""
    size = min(config.federation.clients_per_round, clients)
    chosen = generator(config.seed, "participants", stage, round_).choice(clients, size, replace=False)
    return [int(client) for client in chosen]


def visits(config: RunConfig, clients: int, stage: int, round_: int) -> Counter[int]:
    """How often each client took part before this round."""
    rounds = config.federation.rounds_per_stage
    before = [divmod(number, rounds) for number in range((stage - 1) * rounds + round_ - 1)]
    return Counter(client for s, r in before for client in draw(config, clients, s + 1, r + 1))


def share_size(pool: int, part: int, parts: int) -> int:
    """How many examples the part-th of `parts` draws from a pool holds (see the client's `share`)."""
    if parts == 1 or pool == 0:
        return pool
    size = max(1, pool // parts)
    draws = pool // size
    return pool - (draws - 1) * size if part % draws == draws - 1 else size
