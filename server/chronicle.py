"""What is told of a run while it goes on: events for the tracker, lines for the display."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from fedstrata.core.identity import Token, cosine
from fedstrata.core.records import TrainReply
from fedstrata.core.tracking import Tracker
from fedstrata.scenarios.stream import Scenario
from fedstrata.server.checks import Refused
from fedstrata.server.display import Display
from fedstrata.server.exchange import Ledger, Seat
from fedstrata.server.progress import Progress
from fedstrata.server.roster import Change
from fedstrata.strategies.base import Strategy, Weights

if TYPE_CHECKING:
    from fedstrata.server.plan import Plan

Done = Sequence[tuple[Seat, TrainReply]]


class Chronicle:
    """One run's teller."""

    def __init__(self, tracker: Tracker, display: Display, scenario: Scenario, strategy: Strategy) -> None:
        self.tracker, self.display, self.scenario, self.strategy = tracker, display, scenario, strategy
        self._near: list[float] = []  # this stage's cosines between participants' tokens and their subspaces'
        self.plan: Plan | None = None  # of the whole run
        self._seconds, self._steps = 0.0, 0  # of the first stage's rounds

    def stage(self, stage: int) -> None:
        """A stage begins."""
        names = [self.scenario.tasks[task].name for task in self.scenario.stages[stage - 1]]
        self._near = []
        self.tracker.event("stage_started", stage=stage, tasks=names)
        self.display.stage(stage, names)

    def round(
        self,
        stage: int,
        round_: int,
        done: Done,
        tokens: Mapping[int, Token],
        ledger: Ledger,
        opened: Sequence[int],
        skipped: bool,
        seconds: float,
    ) -> None:
        """A round ended; `tokens` are its participants' by partition, `opened` the subspaces that are new."""
        rows = [self._row(seat, reply, tokens.get(seat.partition)) for seat, reply in done]
        total = sum(row["samples"] for row in rows)
        loss = sum(row["loss"] * row["samples"] for row in rows) / total if total else None
        for bad in ledger.rejected:
            told = {"client": bad.partition, "kind": bad.kind, "reason": bad.reason}
            self.tracker.event("rejected", stage=stage, round=round_, **told)
        if ledger.few:
            self.tracker.event("too_few_instructions", stage=stage, round=round_, clients=sorted(ledger.few))
        for kind in ledger.strays:
            self.tracker.event("stray", stage=stage, round=round_, kind=kind)
        self.tracker.event(
            "round",
            stage=stage,
            round=round_,
            participants=rows,
            loss=loss,
            bytes_up=ledger.up,
            bytes_down=ledger.down,
            seconds=seconds,
            train_seconds=sum(reply.seconds for _, reply in done),
            opened=list(opened),
            skipped=skipped,
        )
        self.display.round(stage, round_, [row["client"] for row in rows], loss, len(ledger.rejected), skipped)
        if stage == 1:
            self._seconds, self._steps = self._seconds + seconds, self._steps + sum(row["steps"] for row in rows)

    def _foresee(self, plan: "Plan", wall: float, scoring: float) -> None:
        """How long the run will take: what the first stage took, and the rest at its pace; what came before was cold.

        wall: seconds so far; scoring: of which the scoring of the first stage.
        """
        if self._steps:
            rounds = max(0, plan.steps - self._steps) * self._seconds / self._steps
            self.tracker.event("time_predicted", stage=1, seconds=wall + rounds + (plan.scorings - 2) * scoring)

    def roster(self, change: Change) -> None:
        """Clients came or went."""
        for client in change.joined:
            self.tracker.event("joined", client=client)
        for client in change.left:
            self.tracker.event("left", client=client)
        for node, reason in change.refused:
            self.tracker.event("node_refused", node=str(node), reason=reason)
        if change.joined or change.left:
            line = f"clients joined: {list(change.joined)}, left: {list(change.left)}"
            self.display.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def quarantined(self, stage: int, round_: int, clients: Mapping[int, int]) -> None:
        """`clients`: {client that is not drawn for a while: the last such round, counted through the run}."""
        for client, last in clients.items():
            self.tracker.event("quarantined", stage=stage, round=round_, client=client, until=last)

    def shrunk(self, stage: int, round_: int, before: int, after: int) -> None:
        """Cohorts did not fit into memory; they are smaller from the next round on."""
        self.tracker.event("cohort_shrunk", stage=stage, round=round_, **{"from": before, "to": after})
        line = f"memory ran out for cohorts of {before}: cohorts of {after} from here on"
        self.display.console.print(f"[bold yellow]warning:[/bold yellow] {line}", highlight=False, soft_wrap=True)

    def refused_scores(self, stage: int, refused: Mapping[int, Refused]) -> None:
        """`refused`: {number of the shard: what was wrong with its score}."""
        for shard, error in refused.items():
            self.tracker.event("score_refused", stage=stage, shard=shard, kind=error.kind, reason=str(error))

    def resumed(self, commit: int, stage: int, round_: int, damaged: Sequence[str], versions: Sequence[str]) -> None:
        """The run goes on from a commit: what was told of this round and of later ones is told again.

        damaged: what is wrong with newer commits; versions: packages that are others than at the commit.
        """
        for reason in damaged:
            self.tracker.event("commit_damaged", reason=reason, used=commit)
            self._warn(f"a damaged commit was passed over: {reason}")
        if versions:
            self.tracker.event("other_versions", packages=list(versions))
            self._warn(f"other versions than at the last commit, so bits may differ: {'; '.join(versions)}")
        self.tracker.event("resumed", commit=commit, stage=stage, round=round_)

    def _warn(self, line: str) -> None:
        self.display.console.print(f"[bold red]warning:[/bold red] {escape(line)}", highlight=False, soft_wrap=True)

    def _row(self, seat: Seat, reply: TrainReply, token: Token | None) -> dict[str, Any]:
        subspace = self.strategy.placement().get(seat.partition, 0)
        tokens = self.strategy.knowledge().tokens
        if token is not None and subspace < len(tokens):
            self._near.append(cosine(token.value, tokens[subspace]))
        tasks = [self.scenario.tasks[task].name for task in seat.assignment.tasks]
        row = {"client": seat.partition, "tasks": tasks, "subspace": subspace}
        return {**row, "samples": reply.count, "steps": reply.steps, "loss": reply.loss}

    def scored(self, stage: int, progress: Progress, routing: Mapping[str, Sequence[int]], seconds: float) -> None:
        """A row was added to the accuracy matrix; `routing` counts {task: examples per heaviest subspace}."""
        matrix = progress.matrix
        self.tracker.event(
            "stage_scored",
            stage=stage,
            scores=matrix.final,
            vocabulary=dict(zip(matrix.tasks, matrix.vocabulary[-1], strict=True)),
            beside=progress.beside,
            routing=routing,
            cosines={"within": self._near, "between": between(self.strategy.knowledge().tokens)},
            bytes_eval=progress.bytes_eval,
            seconds=seconds,
        )
        if self.plan is not None and stage == 1:
            self._foresee(self.plan, progress.wall_seconds, seconds)
        self.display.scored(stage, matrix)


def between(tokens: Weights) -> list[float]:
    """The cosines between every two of the tokens [K, D]."""
    return [cosine(tokens[i], tokens[j]) for i in range(len(tokens)) for j in range(i)]
