"""Scoring a state of knowledge on all tasks, by `evaluate` messages: only the client side holds a model.

The test sets are cut into fixed shards, one message each, so that scores do not depend on the number of actors.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from flwr.app import Message

from fedstrata.core import records
from fedstrata.core.errors import FedstrataError
from fedstrata.core.records import Assignment, Binding, ScoreReply, Shard
from fedstrata.core.scoring import percentages
from fedstrata.scenarios.stream import Scenario
from fedstrata.server import checkpoint
from fedstrata.server.progress import Progress

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
    sent = _messages(federation, shards, stage)
    replies = list(federation.grid.send_and_receive(sent, timeout=federation.config.federation.timeout))
    scores = _sum(sent, shards, replies, len(federation.scenario.tasks))
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
    cost = progress.bytes_eval + records.tensor_bytes(sent) + records.tensor_bytes(replies)
    beside = {task.name: {name: measured[task.name][name] for name in task.beside} for task in tasks if task.beside}
    routing = _routing(progress, scores)
    progress = replace(progress, matrix=matrix, bytes_eval=cost, routing=routing, beside=beside)
    return progress, {name: score.hits for name, score in named.items()}


def cut(scenario: Scenario, split: str, size: int) -> list[Shard]:
    """Fixed shards of `size` examples, task after task. Raises FedstrataError for a task without this split."""
    shards = []
    for index, task in enumerate(scenario.tasks):
        count = len(getattr(task, split))
        if not count:
            raise FedstrataError(f"task {task.name}: has no {split} examples to score")
        shards += [Shard(index, start, min(start + size, count), split) for start in range(0, count, size)]
    return shards


def trained(federation: "Federation", stage: int) -> list[str]:
    """The tasks trained in this stage: a joint run trains all of them from the first one on."""
    if not stage:
        return []
    tasks = federation.scenario.tasks
    if federation.strategy.pooled:
        return [task.name for task in tasks]
    return [tasks[index].name for index in federation.scenario.stages[stage - 1]]


def _messages(federation: "Federation", shards: Sequence[Shard], stage: int) -> list[Message]:
    content = records.knowledge_content(federation.strategy.knowledge())
    nodes = sorted(federation.roster.items())
    messages = []
    for number, shard in enumerate(shards):
        partition, node = nodes[number % len(nodes)]
        binding = Binding(federation.run_id, stage, 0, partition)
        layout = federation.strategy.setup.layout.hash
        meta = Assignment(binding, (shard.task,), config=federation.config_json, layout=layout)
        message = Message(records.with_shard(content, shard), node, records.EVALUATE)
        messages.append(records.address(message, meta))
    return messages


def _sum(sent: Sequence[Message], shards: Sequence[Shard], replies: Sequence[Message], tasks: int) -> list[TaskScore]:
    by_request = {reply.metadata.reply_to_message_id: reply for reply in replies}
    scores = [TaskScore() for _ in range(tasks)]
    for message, shard in zip(sent, shards, strict=True):
        reply = by_request.get(message.metadata.message_id)
        if reply is None or reply.has_error():
            reason = "no reply in time" if reply is None else reply.error.reason
            raise FedstrataError(f"scoring examples {shard.start}-{shard.stop} of task {shard.task} failed: {reason}")
        scores[shard.task].add(records.read_scores(reply))
    return scores


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
    checkpoint.write_atomic(folder / f"stage-{stage}.jsonl", text.encode())
