"""Answering and scoring: the subspaces that a router activates, mixed per input in one forward pass."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedstrata.client.alone import batches_of
from fedstrata.client.banks import bank_of
from fedstrata.client.generation import decode, generate, greedy, passing, questions
from fedstrata.client.identity import identity
from fedstrata.client.model import BaseModel
from fedstrata.core.answers import normalise
from fedstrata.core.records import Knowledge, ScoreReply
from fedstrata.core.scoring import SCORERS
from fedstrata.scenarios.rows import rows_of
from fedstrata.scenarios.stream import Example, Task
from fedstrata.strategies.base import Inputs, Router, Weights

__all__ = ["Answerer", "Answers", "context_of", "generate", "references", "score"]


@dataclass(frozen=True)
class Answers:
    """One generated text per example and the weights α [B, K] that it was generated with."""

    texts: tuple[str, ...]
    weights: Weights


class Answerer:
    """A base model with one state of knowledge on it; several shards may be asked of it."""

    def __init__(
        self, base: BaseModel, knowledge: Knowledge, router: Router, scaling: float, token: str = "text"
    ) -> None:
        """token: what the router's features are made of, text | image | both."""
        self.base, self.router, self.token = base, router, token
        self.bank = bank_of(base, knowledge, scaling)

    def answer(
        self, examples: Sequence[Example], task: int, batch_size: int, max_length: int, overlong: str = "refuse"
    ) -> Answers:
        """Greedy answers, `batch_size` examples of like length in one generation."""
        weights, texts = self.weigh(examples, task), [""] * len(examples)
        alphas, rows = torch.from_numpy(weights), questions(self.base, examples, max_length, overlong)
        shared = passing(self.base, rows) if (weights == weights[:1]).all() else 0  # tokens that one merge serves
        with nullcontext() if self.bank is None else self.bank.on(self.base):
            for places in batches_of(self.bank, alphas, [len(row.prompt) for row in rows], batch_size):
                batch = [rows[place] for place in places]
                if self.bank is not None:
                    self.bank.activate(alphas[places], shared)
                for place, text in zip(places, decode(self.base, greedy(self.base, batch)), strict=True):
                    texts[place] = text
        return Answers(tuple(texts), weights)

    def weigh(self, examples: Sequence[Example], task: int) -> Weights:
        """α [B, K] of the examples."""
        features = None
        if self.router.needs_features and self.bank is not None:
            features = identity(self.base, self.token).encode(examples).numpy()
        return self.router.weights(Inputs(features, [task] * len(examples), [example.id for example in examples]))


def score(
    task: Task, examples: Sequence[Example], answers: Answers, vocabulary: frozenset[str] | None, split: str = "test"
) -> ScoreReply:
    """Statistics of some of a split's examples, by the task's metrics; their points are by the first one.

    `vocabulary`: the task's answers, None where it is open-ended; `hits` counts the examples whose heaviest subspace
    was i.
    """
    pairs = list(zip(answers.texts, map(references, examples), strict=True))
    stats = {metric: _total(metric, task, split, pairs) for metric in (task.metric, *task.beside)}
    scorer, context = SCORERS[task.metric], context_of(task.metric, task, split)
    points = [scorer.points(text, right, context) for text, right in pairs]
    rows = [_row(*item) for item in zip(examples, answers.texts, points, answers.weights, strict=True)]
    return ScoreReply(stats, len(examples), _inside(answers.texts, vocabulary), _hits(answers.weights), tuple(rows))


def references(example: Example) -> tuple[str, ...]:
    """The answers that count as right."""
    return example.references or (example.answer,)


def context_of(metric: str, task: Task, split: str) -> Any:
    """What a metric needs to know of all references of the split, not only of a shard's; once in a process."""
    scorer = SCORERS[metric]
    if not scorer.needs_corpus:
        return None
    rows = rows_of(getattr(task, split))
    key = (metric, task.name, split, rows.marks.digest)
    if key not in _CONTEXTS:
        _CONTEXTS[key] = scorer.context([references(example) for example in rows])
    return _CONTEXTS[key]


_CONTEXTS: dict[tuple[str, ...], Any] = {}


def _total(metric: str, task: Task, split: str, pairs: Sequence[tuple[str, tuple[str, ...]]]) -> tuple[float, ...]:
    scorer, context = SCORERS[metric], context_of(metric, task, split)
    total = np.zeros(scorer.size)
    for text, right in pairs:
        total += scorer.measure(text, right, context)
    return tuple(total.tolist())


def _inside(texts: Sequence[str], vocabulary: frozenset[str] | None) -> int | None:
    if vocabulary is None:
        return None
    known = {normalise(word) for word in vocabulary}
    return sum(normalise(text) in known for text in texts)


def _hits(weights: Weights) -> tuple[int, ...]:
    subspaces = weights.shape[1]
    heaviest = weights.argmax(axis=1) if subspaces else np.zeros(0, dtype=np.int64)
    return tuple(np.bincount(heaviest, minlength=subspaces).tolist())


def _row(example: Example, text: str, points: float, weights: Weights) -> dict[str, Any]:
    alpha = [round(float(weight), 4) for weight in weights]
    return {"id": example.id, "prediction": text, "answer": example.answer, "score": points, "weights": alpha}
