"""Scoring a state of knowledge on all tasks, by `evaluate` messages: only the client side holds a model.

The test sets are cut into fixed shards, one message each, so that scores do not depend on the number of actors.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from flwr.app import Message

from fedstrata.core import durable, records
from fedstrata.core.errors import FedstrataError
from fedstrata.core.records import Assignment, Binding, ScoreReply, Shard
from fedstrata.core.scoring import percentages
from fedstrata.scenarios.stream import Scenario
from fedstrata.server.checks import Refused
from fedstrata.server.gate import Expected, admit, first
from fedstrata.server.progress import Progress
from fedstrata.server.scoregate import read_scores

if TYPE_CHECKING:
    from fedstrata.server.federation import Federation


@dataclass
class TaskScore:
    """Sums over a task's shards; `stats` holds each metric's statistics, the task's own metric first."""

    stats: dict[str, tuple[float, ...]] = field(default_factory=dict)
    count: int = 0
    in_vocabulary: int | None = 0
    hits: list[int] = field(default_factory=list)
    predictions: list[dict[str, Any]] = field(default_factory=list)

    def add(self, reply: ScoreReply) -> None:
        self.stats = {name: _added(self.stats.get(name), total) for name, total in reply.stats.items()}
        self.count += reply.count
        known, more = self.in_vocabulary, reply.in_vocabulary
        self.in_vocabulary = None if known is None or more is None else known + more
        self.hits = [a + b for a, b in zip(self.hits, reply.hits, strict=True)] if self.hits else list(reply.hits)
        self.predictions += reply.predictions

    @property
    def scores(self) -> dict[str, float]:
        """Metric → score, 0–100; the task's own metric first."""
        return percentages(self.stats, self.count)

    @property
    def vocabulary(self) -> float | None:
        """Percentage of answers from the task's vocabulary; None where it is open-ended."""
        return None if self.in_vocabulary is None else 100 * self.in_vocabulary / self.count


def _added(before: tuple[float, ...] | None, more: tuple[float, ...]) -> tuple[float, ...]:
    return more if before is None else tuple(a + b for a, b in zip(before, more, strict=True))


def score_row(federation: "Federation", stage: int) -> tuple[Progress, dict[str, list[int]]]:
    """Scores all tasks, keeps the predictions, and returns the progress with a new row and {task: hits}."""
    shards = cut(federation.scenario, federation.config.evaluate.split, federation.config.evaluate.shard)
    replies, moved = ask(federation, shards, stage)
    scores = [TaskScore() for _ in federation.scenario.tasks]
    for number, reply in sorted(replies.items()):
        scores[shards[number].shard.task].add(reply)
    _keep(federation, stage, scores)
    tasks = federation.scenario.tasks
    named = {task.name: score for task, score in zip(tasks, scores, strict=True)}
    measured = {name: score.scores for name, score in named.items()}
    progress = federation.progress
    matrix = progress.matrix.add_row(
        {task.name: measured[task.name][task.metric] for task in tasks},
        trained(federation, stage),
        {name: score.count for name, score in named.items()},
        {name: score.vocabulary for name, score in named.items()},
    )
    cost = progress.bytes_eval + moved
    beside = {task.name: {name: measured[task.name][name] for name in task.beside} for task in tasks if task.beside}
    routing = _routing(progress, scores) if federation.strategy.routes else {}
    progress = replace(progress, matrix=matrix, bytes_eval=cost, routing=routing, beside=beside)
    return progress, {name: score.hits for name, score in named.items()}


@dataclass(frozen=True)
class Part:
    """A shard, and the client that holds it; None: every client can score it."""

    shard: Shard
    owner: int | None = None


def cut(scenario: Scenario, split: str, size: int) -> list[Part]:
    """Fixed shards of `size` examples, task after task. Raises FedstrataError for a task without this split."""
    parts = []
    for index, task in enumerate(scenario.tasks):
        held = scenario.scored(index, split)
        if not sum(count for _, count in held):
            raise FedstrataError(f"task {task.name}: has no {split} examples to score")
        for owner, count in held:
            starts = range(0, count, size)
            parts += [Part(Shard(index, start, min(start + size, count), split), owner) for start in starts]
    return parts


def trained(federation: "Federation", stage: int) -> list[str]:
    """The tasks trained in this stage: a joint run trains all of them from the first one on."""
    if not stage:
        return []
    tasks = federation.scenario.tasks
    if federation.strategy.pooled:
        return [task.name for task in tasks]
    return [tasks[index].name for index in federation.scenario.stages[stage - 1]]


def ask(federation: "Federation", parts: Sequence[Part], stage: int) -> tuple[dict[int, ScoreReply], int]:
    """Every shard's score, and the bytes that moved. A bad reply is asked for once more, of another node.

    What only one client could have scored is left out of this row.

    Raises:
        FedstrataError: both were bad; names the examples and the reason.
    """
    found: dict[int, ScoreReply] = {}
    moved = 0
    for shift in (0, 1):
        left = [number for number in range(len(parts)) if number not in found]
        sent = _messages(federation, parts, stage, shift) if left else []
        asked = [sent[number] for number in left]
        replies = list(federation.grid.send_and_receive(asked, timeout=federation.config.federation.timeout))
        moved += records.tensor_bytes(asked) + records.tensor_bytes(replies)
        good, bad = _gate(federation, {n: (sent[n], parts[n]) for n in left}, replies)
        found |= good
        federation.chronicle.refused_scores(stage, bad)
        federation.progress = federation.progress.count_rejected(error.kind for error in bad.values())
        if not bad:
            break
    for number, error in sorted(bad.items()):
        shard = parts[number].shard
        others = any(parts[at].shard.task == shard.task for at in found)
        if parts[number].owner is None or not others:
            raise FedstrataError(f"scoring examples {shard.start}-{shard.stop} of task {shard.task} failed: {error}")
    return found, moved


def _gate(
    federation: "Federation", asked: Mapping[int, tuple[Message, Part]], replies: Sequence[Message]
) -> tuple[dict[int, ScoreReply], dict[int, Refused]]:
    """{shard number: its score} of the good replies and {shard number: what is wrong} of the others."""
    came, subspaces = first(replies), len(federation.strategy.knowledge().adapters)
    good, bad = {}, {}
    for number, (message, part) in asked.items():
        task, shard = federation.scenario.tasks[part.shard.task], part.shard
        want = Expected(records.binding(message), 0, shard.stop - shard.start)
        metrics, shown = (task.metric, *task.beside), part.owner is None
        read = partial(read_scores, metrics=metrics, subspaces=subspaces, shown=shown)
        try:
            good[number] = admit(came.get(message.metadata.message_id), want, read)
        except Refused as error:
            bad[number] = error
    return good, bad


def _messages(federation: "Federation", parts: Sequence[Part], stage: int, shift: int) -> list[Message]:
    """One message per shard, to its owner or dealt to the clients in turn; `shift` deals them from a later one on."""
    content = records.knowledge_content(federation.strategy.knowledge())
    nodes = sorted(federation.roster.items())
    messages = []
    for number, part in enumerate(parts):
        dealt = nodes[(number + shift) % len(nodes)]
        partition, node = dealt if part.owner is None else (part.owner, federation.roster[part.owner])
        binding = Binding(federation.run_id, stage, 0, partition)
        layout = federation.strategy.setup.layout.hash
        meta = Assignment(binding, (part.shard.task,), config=federation.config_json, layout=layout)
        message = Message(records.with_shard(content, part.shard), node, records.EVALUATE)
        messages.append(records.address(message, meta))
    return messages


def _routing(progress: Progress, scores: Sequence[TaskScore]) -> Mapping[int, float]:
    """Per trained task the percentage of examples whose heaviest subspace is the task's own."""
    found = {}
    for task, score in enumerate(scores):
        owner = progress.owner(task)
        if owner is not None and len(score.hits) > 1 and score.count:
            found[task] = 100 * score.hits[owner] / score.count
    return found


def _keep(federation: "Federation", stage: int, scores: Sequence[TaskScore]) -> None:
    """predictions/stage-<t>.jsonl: one line per example."""
    folder = federation.folder / "predictions"
    folder.mkdir(exist_ok=True)
    names = [task.name for task in federation.scenario.tasks]
    rows = [{"task": n, **row} for n, score in zip(names, scores, strict=True) for row in score.predictions]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    durable.write_atomic(folder / f"stage-{stage}.jsonl", text.encode())
