"""Scorers: how generated answers are compared with the references, under the names that scenario files use.

A test set is cut into shards and each is scored where a model is, so every scorer is a vector of statistics that adds
up over examples and a last step from the sum to a percentage. What is not a count is kept on a grid (`grid`): sums are
then exact, and no score depends on how many examples a shard has.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedstrata.core import answers, boxes, captions, cider

Statistics = NDArray[np.float64]
Rule = Callable[[str, str], float]  # (prediction, reference) → 0.0 or 1.0
Value = Callable[[str, tuple[str, ...], Any], float]  # (prediction, references, context)


class Scorer(Protocol):
    """One metric. `references` is never empty; a prediction may be."""

    @property
    def size(self) -> int:
        """Length of the statistics vector."""

    @property
    def needs_corpus(self) -> bool:
        """Whether `context` reads the references at all; reading a split may mean reading files."""

    def context(self, corpus: Sequence[tuple[str, ...]]) -> Any:
        """What `measure` needs to know of the references of all examples of the split; None for most."""

    def measure(self, prediction: str, references: tuple[str, ...], context: Any) -> Statistics:
        """One example's statistics [size], float64; those of several examples are added."""

    def finish(self, total: Statistics, count: int) -> float:
        """The score of `count` examples, 0–100, from the sum of their statistics."""

    def points(self, prediction: str, references: tuple[str, ...], context: Any) -> float:
        """What this one example is worth, 0–1: what predictions/*.jsonl shows."""


def grid(value: float) -> float:
    """The nearest multiple of 2⁻³²: sums below two million are exact in float64, in any order."""
    return round(value * 2**32) / 2**32


@dataclass(frozen=True)
class Share:
    """The percentage of predictions that are right by `rule` for at least one of their references."""

    rule: Callable[[str, str], float]  # (prediction, reference) → 0.0 or 1.0
    size: int = 1
    needs_corpus: bool = False

    def context(self, corpus: Sequence[tuple[str, ...]]) -> None:
        return None

    def measure(self, prediction: str, references: tuple[str, ...], context: Any) -> Statistics:
        return np.array([self.points(prediction, references, context)])

    def finish(self, total: Statistics, count: int) -> float:
        return 100 * float(total[0]) / count

    def points(self, prediction: str, references: tuple[str, ...], context: Any) -> float:
        return max(self.rule(prediction, reference) for reference in references)


class Caption:
    """What all metrics of captions share. One example's points are its ROUGE-L, which means something alone."""

    def context(self, corpus: Sequence[tuple[str, ...]]) -> Any:
        return None

    def points(self, prediction: str, references: tuple[str, ...], context: Any) -> float:
        return captions.rouge_l(prediction, references)


@dataclass(frozen=True)
class Bleu(Caption):
    """Corpus BLEU of n-grams up to `order`: `captions.bleu`."""

    order: int
    size: int = captions.BLEU_COUNTS
    needs_corpus: bool = False

    def measure(self, prediction: str, references: tuple[str, ...], context: Any) -> Statistics:
        return np.array(captions.bleu_counts(prediction, references), dtype=np.float64)

    def finish(self, total: Statistics, count: int) -> float:
        return captions.bleu([round(number) for number in total.tolist()], self.order)


@dataclass(frozen=True)
class Mean(Caption):
    """100 times the mean of `value` over the examples, cut at 100."""

    value: Value
    size: int = 1
    needs_corpus: bool = False

    def measure(self, prediction: str, references: tuple[str, ...], context: Any) -> Statistics:
        return np.array([grid(self.value(prediction, references, context))])

    def finish(self, total: Statistics, count: int) -> float:
        return min(100.0, 100 * float(total[0]) / count)


@dataclass(frozen=True)
class Cider(Mean):
    """CIDEr-D × 100, cut at 100: it runs to 1000, but good captions have about 100 and a table must end somewhere."""

    value: Value = captions.cider_d
    needs_corpus: bool = True

    def context(self, corpus: Sequence[tuple[str, ...]]) -> cider.Frequencies:
        return captions.frequencies(corpus)


@dataclass(frozen=True)
class Average(Cider):
    """FCIT's headline for Flickr30k: the plain mean of BLEU-1 … 4, METEOR, ROUGE-L and CIDEr-D, each × 100; cut at 100.

    CIDEr-D goes into the mean uncut, up to 1000, as in the published code; near-perfect captions would pass 100. METEOR
    and the tokenizer are not the published Java programs, so values are near the published ones but not the same.
    Statistics: those of BLEU, then the sums of the other three.
    """

    size: int = captions.BLEU_COUNTS + 3

    def measure(self, prediction: str, references: tuple[str, ...], context: Any) -> Statistics:
        values = (captions.meteor, captions.rouge_l, captions.cider_d)
        means = [grid(value(prediction, references, context)) for value in values]
        return np.array([*captions.bleu_counts(prediction, references), *means], dtype=np.float64)

    def finish(self, total: Statistics, count: int) -> float:
        bleus = [Bleu(order).finish(total[:-3], count) for order in range(1, captions.ORDERS + 1)]
        means = [100 * value / count for value in total[-3:].tolist()]
        return min(100.0, math.fsum(bleus + means) / len(bleus + means))


SCORERS: Mapping[str, Scorer] = {
    "exact_match": Share(answers.exact_match),
    "fcit_exact": Share(answers.fcit_exact),
    "option_letter": Share(answers.option_letter),
    "fcit_substring": Share(answers.fcit_substring),
    "substring": Share(answers.substring),
    "fcit_iou": Share(boxes.fcit_iou),
    "iou": Share(boxes.iou),
    **{f"bleu{order}": Bleu(order) for order in range(1, captions.ORDERS + 1)},
    "meteor": Mean(captions.meteor),
    "rouge_l": Mean(captions.rouge_l),
    "cider": Cider(),
    "caption_average": Average(),
}


def percentages(stats: Mapping[str, Sequence[float]], count: int) -> dict[str, float]:
    """{metric: score 0–100} of `count` examples from the sums of their statistics."""
    return {name: SCORERS[name].finish(np.array(total, dtype=np.float64), count) for name, total in stats.items()}
