"""Scoring a shard: which statistics a reply carries, and what they need to know of the rest of the split."""

import numpy as np
import pytest

from fedstrata.client import evaluation
from fedstrata.client.evaluation import Answers, context_of, score
from fedstrata.core.records import ScoreReply
from fedstrata.core.scoring import percentages
from fedstrata.scenarios.stream import Example, Task
from fedstrata.server.scoring import TaskScore

CAPTIONS = (
    Example("0", "?", "a dog runs", references=("a dog runs fast", "the dog is running")),
    Example("1", "?", "a cat sleeps", references=("a cat sleeps now",)),
    Example("2", "?", "two men sit down"),
    Example("3", "?", "some birds fly away"),
)
TEXTS = ("a dog runs fast", "a cat", "two men", "")


def answers(*texts: str, weights: tuple[float, ...] = (0.25, 0.75)) -> Answers:
    return Answers(texts, np.tile(np.array(weights, dtype=np.float32), (len(texts), 1)))


def captions(**changes: str | tuple[str, ...]) -> Task:
    return Task("captions", (), CAPTIONS, metric="caption_average", beside=("cider", "rouge_l"), **changes)  # type: ignore[arg-type]


def shards(size: int) -> list[ScoreReply]:
    starts = range(0, len(CAPTIONS), size)
    cut = [(CAPTIONS[start : start + size], answers(*TEXTS[start : start + size])) for start in starts]
    return [score(captions(), examples, given, None) for examples, given in cut]


def test_right_answers_are_counted_and_shown() -> None:
    task = Task("t", (), (Example("a", "?", "Red"), Example("b", "?", "blue")))
    reply = score(task, task.test, answers("red.", "green"), frozenset({"red", "blue"}))
    assert reply.stats == {"exact_match": (1.0,)}
    assert (reply.count, reply.in_vocabulary, reply.hits) == (2, 1, (0, 2))
    assert reply.predictions == (
        {"id": "a", "prediction": "red.", "answer": "Red", "score": 1.0, "weights": [0.25, 0.75]},
        {"id": "b", "prediction": "green", "answer": "blue", "score": 0.0, "weights": [0.25, 0.75]},
    )


def test_an_open_ended_task_has_no_vocabulary_rate() -> None:
    assert score(captions(), CAPTIONS, answers(*TEXTS), None).in_vocabulary is None


def test_no_subspace_no_hits() -> None:
    task = Task("t", (), (Example("a", "?", "red"),))
    assert score(task, task.test, answers("red", weights=()), frozenset()).hits == ()


def test_a_reply_carries_the_tasks_metric_first_and_then_those_beside_it() -> None:
    reply = shards(4)[0]
    assert list(reply.stats) == ["caption_average", "cider", "rouge_l"]
    assert [len(total) for total in reply.stats.values()] == [13, 1, 1]
    assert reply.predictions[0]["score"] == 1.0  # ROUGE-L with its best reference


@pytest.mark.parametrize("size", [1, 2, 3])
def test_shards_add_up_to_the_whole_to_the_last_bit(size: int) -> None:
    whole, parts = TaskScore(), TaskScore()
    for total, replies in ((whole, shards(4)), (parts, shards(size))):
        for reply in replies:
            total.add(reply)
    assert parts == whole
    assert parts.scores == whole.scores == percentages(shards(4)[0].stats, 4)
    assert 0 < whole.scores["cider"] <= 100
    assert whole.vocabulary is None


def test_a_context_is_made_once_and_of_the_split_that_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_CONTEXTS", {})
    first = context_of("cider", captions(), "test")
    assert first.pictures == 4
    assert first.counts[("dog",)] == 1  # one picture, two captions
    assert context_of("cider", captions(), "test") is first
    assert context_of("cider", captions(val=CAPTIONS[:2]), "val").pictures == 2  # type: ignore[arg-type]
    assert context_of("cider", Task("captions", (), CAPTIONS[1:]), "test").pictures == 3


def test_metrics_that_need_no_context_read_no_split() -> None:
    assert context_of("exact_match", Task("t", (), None), "test") is None  # type: ignore[arg-type]
