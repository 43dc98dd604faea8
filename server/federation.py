"""The federation loop: the page that everybody reads first.

For each stage, begin_stage; for each round, two gated exchanges; end_stage; score all tasks; append a row to the
accuracy matrix. The loop is ours because Flower's `Strategy.start` counts from round 1 and has no checkpoint; it calls
a Flower strategy's own `configure_train` / `aggregate_train`, so any Flower strategy runs in it. A round is a pure
function of (seed, stage, round, state); every round ends in one commit.
"""

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedstrata.core import durable, records
from fedstrata.core.config import RunConfig
from fedstrata.core.errors import FedstrataError
from fedstrata.core.privacy import token_options
from fedstrata.core.records import Assignment, Binding
from fedstrata.scenarios.stream import Scenario
from fedstrata.server import checkpoint, clipping, fitting, memory, noise, privacy
from fedstrata.server.checks import Kind
from fedstrata.server.chronicle import Chronicle, Done
from fedstrata.server.exchange import Exchange, Ledger, Question, Seat, questions
from fedstrata.server.gate import read_token, read_update
from fedstrata.server.participation import earlier, participants, share_size
from fedstrata.server.passing import ParticipantsGrid
from fedstrata.server.progress import Progress
from fedstrata.server.replies import Replies
from fedstrata.server.roster import Roster
from fedstrata.server.scoring import score_row
from fedstrata.strategies.base import Participant, Strategy


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
        roster: Roster,
        folder: Path,
        chronicle: Chronicle,
        progress: Progress,
        dim: int,
        bound: Mapping[str, Any],
    ) -> None:
        """roster: who is there; dim: length of an identity token; bound: what its commits belong to."""
        self.config, self.config_json, self.run_id = config, config_json, run_id
        self.scenario, self.strategy, self.grid, self.roster = scenario, strategy, grid, roster
        self.folder, self.chronicle, self.progress, self.dim = folder, chronicle, noise.keyed(config, progress), dim
        self.rounds = config.federation.rounds_per_stage
        self.bound = dict(bound)
        self.clients = memory.Clients(grid, roster)
        self.replies = Replies(folder / "checkpoints")
        self.exchange = Exchange(grid, config.federation.timeout, self.replies)
        self.tokens: memory.Tokens = {}  # (client, hash of its data) → token, asked for once
        fitting.resize(grid, progress.cohort or fitting.cohort_of(grid))

    def run(self) -> Progress:
        """Runs what is left of the scenario."""
        if not self.progress.matrix.scores:
            self._score(stage=0)
        for stage in range(self.progress.stage, len(self.scenario.stages) + 1):
            self.chronicle.roster(self.roster.look(anew=stage > 1 and self.progress.round == 1))
            self.strategy.begin_stage(stage)
            self.chronicle.stage(stage)
            for round_ in range(self.progress.round, self.rounds + 1):
                self._round(stage, round_)
            self.strategy.end_stage(stage)
            self._score(stage)
        return self.progress

    def rehearse(self) -> None:
        """The first round, without what comes before and after it."""
        self.strategy.begin_stage(1)
        self.chronicle.stage(1)
        self._round(1, 1)

    def _round(self, stage: int, round_: int) -> None:
        """query.identify → gate → match, then train → gate → aggregate → commit."""
        began, ledger = time.perf_counter(), Ledger()
        self.chronicle.roster(self.roster.look())
        seats = self._enough(stage, round_, self._sample(stage, round_), ledger)
        participants = self._identify(seats, ledger)
        known = len(self.strategy.knowledge().adapters)
        self.strategy.meet(participants)
        messages = self._configure(stage, round_, participants)
        updates = self._train(seats, messages, ledger)
        skipped = len(updates) < self.config.federation.min_replies
        if not skipped:
            self.strategy.aggregate_train(self._number(stage, round_), updates)
        self._check_failures(ledger)
        by_partition = {seat.partition: seat for seat in seats}
        done = [(by_partition[reply.binding.partition], reply) for reply in updates.replies] if not skipped else []
        seconds = time.perf_counter() - began
        self._book(stage, round_, done, ledger, skipped, seconds)
        self._shrink(stage, round_, done)
        tokens = {p.partition: p.token for p in participants if p.token is not None}
        opened = range(known, len(self.strategy.knowledge().adapters))
        self.chronicle.round(stage, round_, done, tokens, ledger, opened, skipped, seconds)
        self._commit()

    def _sample(self, stage: int, round_: int) -> list[Seat]:
        """This round's participants, drawn from (seed, stage, round); a client without data has no seat."""
        number = self._number(stage, round_)
        away = {client for client, until in self.progress.quarantine.items() if until >= number}
        away.update(set(range(self.scenario.client_count)) - set(self.roster))
        drawn = participants(self.config, self.scenario, stage, round_, self.strategy.pooled, away)
        past = earlier(self.config, self.scenario, stage, round_) if self.strategy.pooled else Counter[int]()
        seats = [self._seat(stage, round_, place, client, past[client]) for place, client in enumerate(drawn)]
        return [seat for seat in seats if seat.samples > 0]

    def _enough(self, stage: int, round_: int, seats: Sequence[Seat], ledger: Ledger) -> list[Seat]:
        """Without the clients that hold too few instructions for a token; they are listed."""
        least = privacy.least(self.config)
        ledger.few.update(privacy.too_few(self.config, self.scenario, stage, round_))
        ledger.few.update(seat.partition for seat in seats if seat.samples < least)
        return [seat for seat in seats if seat.samples >= least]

    def _seat(self, stage: int, round_: int, position: int, client: int, part: int) -> Seat:
        tasks, parts = self.scenario.tasks_of(stage, round_, position, client), 1
        if self.strategy.pooled:
            tasks, parts = tuple(range(len(self.scenario.tasks))), len(self.scenario.stages)
        binding = Binding(self.run_id, stage, round_, client)
        layout = self.strategy.setup.layout.hash
        assignment = Assignment(binding, tasks, part, parts, self.config_json, layout)
        when = (stage, round_) if parts == 1 else ()
        samples = share_size(self.scenario.share_size(tasks, client, *when), part, parts)
        return Seat(self.roster[client], assignment, samples)

    def _identify(self, seats: Sequence[Seat], ledger: Ledger) -> list[Participant]:
        """Participants with what the method asks for; tokens are cached until a client's data change."""
        if self.strategy.needs_tokens:
            asked = [seat for seat in seats if self._data(seat) not in self.tokens]
            by_partition = {seat.partition: seat for seat in asked}
            sent = questions(asked, records.IDENTIFY)
            question = Question(read_token, self.dim, upload=token_options(self.config.strategy).token_upload)
            for passed in self.exchange.ask(question, asked, sent, ledger):
                self.tokens[self._data(by_partition[passed.partition])] = passed.value
            ledger.few.update(bad.partition for bad in ledger.rejected if bad.kind == Kind.TOO_FEW)
            ledger.rejected = [bad for bad in ledger.rejected if bad.kind != Kind.TOO_FEW]
            ledger.told.update(by_partition.keys() - ledger.few)
            seats = [seat for seat in seats if self._data(seat) in self.tokens]
        told, asked_for = self.strategy.uses_task_identity, self.strategy.needs_tokens
        return [
            Participant(
                seat.node,
                seat.partition,
                self.tokens[self._data(seat)] if asked_for else None,
                seat.assignment.tasks if told else None,
            )
            for seat in seats
        ]

    def _configure(self, stage: int, round_: int, participants: Sequence[Participant]) -> list[Message]:
        view = ParticipantsGrid(self.grid, [participant.node for participant in participants])
        number = self._number(stage, round_)
        return list(self.strategy.configure_train(number, ArrayRecord(), ConfigRecord(), view)) if participants else []

    def _train(self, seats: Sequence[Seat], messages: Sequence[Message], ledger: Ledger) -> clipping.Updates:
        """The good replies, clipped if that is asked for; the norms of their updates go into the ledger."""
        size = self.strategy.setup.layout.size(self.strategy.adapter_rank)
        section = self.config.federation
        limits = {client: self.progress.limit(subspace) for client, subspace in self.strategy.placement().items()}
        if section.update_noise:
            limits = {}  # they come of others' updates, and clipping bounds the norm
        question = Question(read_update, size, limits, self.strategy.extras(), section.upload)
        self.clients.asked([seat.partition for seat in seats])
        good = self.exchange.ask(question, seats, messages, ledger)
        updates = clipping.Updates(good, clipping.starts(seats, messages))
        ledger.accepted, ledger.norms = {passed.partition for passed in good}, updates.norms
        if section.clip == "median":
            scaled = clipping.factors(ledger.norms, self.strategy.placement(), self.progress.usual)
            return replace(updates, scaled=scaled)
        return noise.guarded(updates, self.strategy, section, noise.key_of(self.config, self.progress))

    def _data(self, seat: Seat) -> tuple[int, str]:
        at = seat.assignment.binding
        return seat.partition, self.scenario.data_key(seat.assignment.tasks, seat.partition, at.stage, at.round)

    def _number(self, stage: int, round_: int) -> int:
        """Flower's server_round: rounds counted through the whole run."""
        return (stage - 1) * self.rounds + round_

    def _check_failures(self, ledger: Ledger) -> None:
        limit = self.config.federation.max_failures
        if limit is not None and len(ledger.rejected) > limit:
            reasons = "; ".join(f"client {bad.partition}: {bad.reason}" for bad in ledger.rejected)
            rule = f"federation.max_failures = {limit}"
            raise FedstrataError(f"{rule}, but this round had {len(ledger.rejected)}: {reasons}")

    def _book(self, stage: int, round_: int, done: Done, ledger: Ledger, skipped: bool, seconds: float) -> None:
        """Moves the progress past this round."""
        placement, good = self.strategy.placement(), {seat.partition for seat, _ in done}
        progress = self._judge(stage, round_, ledger)
        norms = {client: norm for client, norm in ledger.norms.items() if client in good}
        progress = progress.count_norms((placement.get(client, 0), norm) for client, norm in norms.items())
        progress = progress.count_sent(ledger.told, good, ledger.few)
        for seat, _ in done:
            progress = progress.count_trained(self._counts(seat), placement.get(seat.partition, 0))
        self.progress = replace(
            progress,
            stage=stage,
            round=round_ + 1,
            bytes_up=progress.bytes_up + ledger.up,
            bytes_down=progress.bytes_down + ledger.down,
            skipped_rounds=progress.skipped_rounds + skipped,
            train_seconds=progress.train_seconds + sum(reply.seconds for _, reply in done),
            wall_seconds=progress.wall_seconds + seconds,
        )

    def _shrink(self, stage: int, round_: int, done: Done) -> None:
        """Cohorts for which a client had no memory are smaller from the next round on."""
        before = fitting.cohort_of(self.grid)
        self.progress = self.progress.fit((reply.options for _, reply in done), before)
        fitting.resize(self.grid, self.progress.cohort or before)
        if (after := fitting.cohort_of(self.grid)) < before:
            self.chronicle.shrunk(stage, round_, before, after)

    def _judge(self, stage: int, round_: int, ledger: Ledger) -> Progress:
        """Counts what was refused; who is refused round after round is not drawn for a while."""
        bad = {rejected.partition for rejected in ledger.rejected}
        judged = self.progress.judge(self._number(stage, round_), ledger.accepted - bad, bad)
        new = {c: last for c, last in judged.quarantine.items() if last != self.progress.quarantine.get(c)}
        self.chronicle.quarantined(stage, round_, new)
        return judged.count_rejected([*(rejected.kind for rejected in ledger.rejected), *ledger.strays])

    def _counts(self, seat: Seat) -> dict[int, int]:
        """{task: instructions} of a seat's share; a draw from pooled data is counted by the pool's proportions."""
        at, parts = seat.assignment.binding, seat.assignment.parts
        when = (at.stage, at.round) if parts == 1 else ()
        return {t: self.scenario.share_size([t], at.partition, *when) // parts for t in seat.assignment.tasks}

    def _score(self, stage: int) -> None:
        """Appends the row of `stage` (0: before training) to the accuracy matrix and commits."""
        began = time.perf_counter()
        self.chronicle.roster(self.roster.look())
        progress, routing = score_row(self, stage)
        seconds = time.perf_counter() - began
        self.progress = replace(progress, stage=stage + 1, round=1, wall_seconds=progress.wall_seconds + seconds)
        self.chronicle.scored(stage, self.progress, routing, seconds)
        self._commit(keep=True)

    def _commit(self, keep: bool = False) -> None:
        self.progress = replace(self.progress, commits=self.progress.commits + 1)
        at, kept = self.progress.to_json(), memory.pack(self.tokens, self.strategy)
        folder, number = self.folder / "checkpoints", self.progress.commits
        commit = checkpoint.Commit(self.strategy.save(), at, number, kept, self.bound, self.clients.store(folder))
        checkpoint.write(folder, commit, keep)
        self.replies.clear()
        self.write_matrix()

    def write_matrix(self) -> None:
        """matrix.json as of the last commit."""
        matrix = json.dumps(self.progress.matrix.to_json(), indent=1).encode()
        durable.write_atomic(self.folder / "matrix.json", matrix, flush=False)  # the commit has it, too
