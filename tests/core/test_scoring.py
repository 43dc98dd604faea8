"""The catalogue of metrics: what they add up does not depend on shards or order."""

import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from fedstrata.core.scoring import SCORERS, grid, percentages

TEXT = "A dog and a red cat sit on the old mat in the sun . yes no B"
BOX = "[0.0, 0.1, 0.5, 0.{}]"
Pair = tuple[str, tuple[str, ...]]


def made(count: int) -> list[Pair]:
    """Predictions with one to five references, right ones, boxes and empty ones among them."""
    draw = random.Random(5)

    def text() -> str:
        return " ".join(draw.choice(TEXT.split()) for _ in range(draw.randint(0, 9)))

    pairs: list[Pair] = []
    for number in range(count):
        references = tuple(text() or "no" for _ in range(draw.randint(1, 5)))
        pairs.append((references[-1] if number % 4 == 0 else text(), references))
        pairs.append((BOX.format(draw.randint(50, 99)), (BOX.format(draw.randint(50, 99)),)))
    return pairs


def score(metric: str, shards: Sequence[Sequence[Pair]]) -> float:
    """Shards added up one after another, as a server does."""
    scorer = SCORERS[metric]
    context = scorer.context(sorted(references for shard in shards for _, references in shard))
    totals = [sum((scorer.measure(*pair, context) for pair in shard), np.zeros(scorer.size)) for shard in shards]
    return scorer.finish(sum(totals, np.zeros(scorer.size)), sum(map(len, shards)))


def cuts(pairs: Sequence[Pair]) -> Iterator[list[Sequence[Pair]]]:
    for size in (1, 3, 7, 25):
        yield [pairs[start : start + size] for start in range(0, len(pairs), size)]
    yield [pairs[:31], pairs[31:33], pairs[33:]]


@pytest.mark.parametrize("metric", SCORERS)
def test_a_score_is_the_same_to_the_last_bit_however_its_examples_are_cut(metric: str) -> None:
    pairs = made(40)
    whole = score(metric, [pairs])
    assert 0 < whole <= 100
    assert {score(metric, shards) for shards in cuts(pairs)} == {whole}


@pytest.mark.parametrize("metric", SCORERS)
def test_a_score_does_not_depend_on_the_order_of_examples(metric: str) -> None:
    pairs = made(40)
    whole = score(metric, [pairs])
    random.Random(1).shuffle(pairs)
    assert score(metric, [pairs]) == whole


@pytest.mark.parametrize("metric", SCORERS)
def test_every_scorer_keeps_its_promises(metric: str) -> None:
    scorer, pairs = SCORERS[metric], made(10)
    context = scorer.context([references for _, references in pairs])
    assert (context is None) == (not scorer.needs_corpus)
    for pair in [*pairs, ("", ("red",)), ("", ("",))]:
        stats = scorer.measure(*pair, context)
        assert stats.shape == (scorer.size,)
        assert stats.dtype == np.float64
        assert 0 <= scorer.points(*pair, context) <= 1
        assert 0 <= scorer.finish(stats, 1) <= 100


@pytest.mark.parametrize("metric", ["exact_match", "fcit_exact", "substring", "option_letter", "iou"])
def test_an_empty_prediction_is_wrong(metric: str) -> None:
    assert SCORERS[metric].points("", ("B", "[0, 0, 1, 1]"), None) == 0.0


def test_an_empty_prediction_is_right_by_the_published_substring_rule() -> None:
    assert SCORERS["fcit_substring"].points("", ("no",), None) == 1.0


def test_one_of_several_references_is_enough() -> None:
    assert SCORERS["exact_match"].points("red", ("blue", "Red."), None) == 1.0


def test_right_answers_are_a_percentage_as_they_always_were() -> None:
    for correct in range(151):
        assert percentages({"exact_match": (float(correct),)}, 150) == {"exact_match": 100 * correct / 150}


def test_points_of_captions_are_their_rouge_l() -> None:
    scorer = SCORERS["cider"]
    assert scorer.points("a dog runs", ("a dog runs",), scorer.context([("a dog runs",)])) == 1.0


def test_sums_on_the_grid_are_exact_in_any_order() -> None:
    draw = random.Random(0)
    values = [grid(10 * draw.random()) for _ in range(10_000)]
    assert sum(values) == sum(sorted(values)) == sum(reversed(values)) == float(np.sum(values))
    assert abs(grid(1 / 3) - 1 / 3) <= 2**-33
