"""Answering and scoring: the subspaces that a router activates, mixed per input in one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fedstrata.client.lora import adapted
from fedstrata.client.mixture import Mixture
from fedstrata.client.model import BaseModel
from fedstrata.core.answers import normalise
from fedstrata.core.identity import Token
from fedstrata.core.records import Knowledge, ScoreReply
from fedstrata.core.scoring import SCORERS
from fedstrata.scenarios.rows import rows_of
from fedstrata.scenarios.stream import Example, Task
from fedstrata.strategies.base import Inputs, Router, Weights


@dataclass(frozen=True)
class Answers:
    """One generated text per example and the weights α [B, K] that it was generated with."""

    texts: tuple[str, ...]
    weights: Weights


class Answerer:
    """A base model with one state of knowledge on it; several shards may be asked of it."""

    def __init__(self, base: BaseModel, knowledge: Knowledge, router: Router, scaling: float) -> None:
        self.base, self.router = base, router
        flats, dtype = knowledge.adapters, torch.float32
        self.bank = Mixture.of(flats, base.layout, scaling, base.device, dtype, knowledge.shared) if flats else None

    def answer(
        self, examples: Sequence[Example], task: int, batch_size: int, max_length: int, overlong: str = "refuse"
    ) -> Answers:
        """Greedy answers, `batch_size` examples in one generation."""
        texts: list[str] = []
        weights = self.weigh(examples, task)
        with adapted(self.base, self.bank):
            for start in range(0, len(examples), batch_size):
                stop = start + batch_size
                if self.bank is not None:
                    self.bank.activate(torch.from_numpy(weights[start:stop]))
                texts += generate(self.base, examples[start:stop], max_length, overlong)
        return Answers(tuple(texts), weights)

    def weigh(self, examples: Sequence[Example], task: int) -> Weights:
        """α [B, K] of the examples."""
        features = None
        if self.router.needs_features and self.bank is not None:
            features = self.base.encoder.encode([example.question for example in examples]).numpy()
        return self.router.weights(Inputs(features, [task] * len(examples), [example.id for example in examples]))


@torch.no_grad()
def generate(base: BaseModel, examples: Sequence[Example], max_length: int, overlong: str = "refuse") -> list[str]:
    """One batch of greedy answers to the first questions, prompts padded on the left.

    overlong: cut: a question is cut as if its answer were empty, so that what is asked does not depend on it.
    """
    asked = [replace(example, more=(), answer="" if overlong == "cut" else example.answer) for example in examples]
    prepared = base.prepare(asked, max_length, overlong)
    batch = base.embed([p.prompt for p in prepared], [p.features for p in prepared], left=True)
    tokens = base.model.generate(
        inputs_embeds=batch.embeds,
        attention_mask=batch.mask,
        max_new_tokens=base.max_new_tokens,
        do_sample=False,
        pad_token_id=base.tokenizer.pad_token_id if base.tokenizer.pad_token_id is not None else 0,
        eos_token_id=base.tokenizer.eos_token_id,
    )
    return [text.strip() for text in base.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def identify(base: BaseModel, examples: Sequence[Example]) -> Token:
    """A client's identity token: the mean feature over all of its instructions."""
    features = base.encoder.encode([example.question for example in examples])
    return Token(features.double().mean(0).float().numpy(), len(examples))


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
