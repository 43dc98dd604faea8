"""Adding up what shards reply."""

from typing import Any

import pytest

from fedstrata.core.metrics import AccuracyMatrix
from fedstrata.core.records import ScoreReply
from fedstrata.server.progress import Progress
from fedstrata.server.scoring import TaskScore


def total(*replies: ScoreReply) -> TaskScore:
    score = TaskScore()
    for reply in replies:
        score.add(reply)
    return score


def reply(correct: float, count: int, known: int | None = None, **more: Any) -> ScoreReply:
    return ScoreReply({"exact_match": (correct,), **more}, count, known, (1, count - 1), ({"id": str(count)},))


def test_shards_of_a_task_are_added() -> None:
    score = total(reply(20.0, 25, 25), reply(13.0, 25, 20), reply(1.0, 5, 0))
    assert score.scores == {"exact_match": 100 * 34 / 55}
    assert score.vocabulary == 100 * 45 / 55
    assert score.hits == [3, 52]
    assert [row["id"] for row in score.predictions] == ["25", "25", "5"]


def test_one_shard_without_a_vocabulary_leaves_the_task_without_one() -> None:
    assert total(reply(1.0, 2, 2), reply(1.0, 2)).vocabulary is None
    assert total(reply(1.0, 2, 0)).vocabulary == 0.0


def test_every_metric_has_its_own_sum() -> None:
    score = total(reply(1.0, 2, fcit_exact=(2.0,)), reply(0.0, 2, fcit_exact=(0.0,)))
    assert score.scores == {"exact_match": 25.0, "fcit_exact": 50.0}


def test_shards_with_other_statistics_do_not_mix() -> None:
    with pytest.raises(ValueError, match="zip"):
        total(reply(1.0, 2), reply(1.0, 2, exact_match=(1.0, 2.0)))


def test_further_metrics_survive_a_checkpoint_and_old_checkpoints_have_none() -> None:
    progress = Progress(AccuracyMatrix((), (), ()), beside={"captions": {"cider": 81.25}})
    tree = progress.to_json()
    assert Progress.from_json(tree) == progress
    del tree["beside"]
    assert Progress.from_json(tree).beside == {}
