"""Answering and scoring: the subspaces that a router activates, mixed per input in one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedstrata.client.lora import Mixture, adapted
from fedstrata.client.model import BaseModel
from fedstrata.core.identity import Token
from fedstrata.core.records import Knowledge, ScoreReply
from fedstrata.core.scoring import SCORERS, normalise
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
        self.bank = Mixture.of(flats, base.layout, scaling, base.device, dtype) if flats else None

    def answer(self, examples: Sequence[Example], task: int, batch_size: int, max_length: int) -> Answers:
        """Greedy answers, `batch_size` examples in one generation."""
        texts: list[str] = []
        weights = self.weigh(examples, task)
        with adapted(self.base, self.bank):
            for start in range(0, len(examples), batch_size):
                stop = start + batch_size
                if self.bank is not None:
                    self.bank.activate(torch.from_numpy(weights[start:stop]))
                texts += generate(self.base, examples[start:stop], max_length)
        return Answers(tuple(texts), weights)

    def weigh(self, examples: Sequence[Example], task: int) -> Weights:
        """α [B, K] of the examples."""
        features = None
        if self.router.needs_features and self.bank is not None:
            features = self.base.encoder.encode([example.question for example in examples]).numpy()
        return self.router.weights(Inputs(features, [task] * len(examples), [example.id for example in examples]))


@torch.no_grad()
def generate(base: BaseModel, examples: Sequence[Example], max_length: int) -> list[str]:
    """One batch of greedy answers, prompts padded on the left."""
    prepared = base.prepare(examples, max_length)
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


def score(task: Task, examples: Sequence[Example], answers: Answers, vocabulary: frozenset[str]) -> ScoreReply:
    """Scores answers by the task's metric; `hits` counts the examples whose heaviest subspace was i."""
    scorer = SCORERS[task.metric]
    known = {normalise(word) for word in vocabulary}
    points = [scorer(text, example.answer) for text, example in zip(answers.texts, examples, strict=True)]
    subspaces = answers.weights.shape[1]
    heaviest = answers.weights.argmax(axis=1) if subspaces else np.zeros(0, dtype=np.int64)
    hits = np.bincount(heaviest, minlength=subspaces).tolist()
    rows = [_row(*item) for item in zip(examples, answers.texts, points, answers.weights, strict=True)]
    inside = sum(normalise(text) in known for text in answers.texts)
    return ScoreReply(float(sum(points)), len(examples), inside, tuple(hits), tuple(rows))


def _row(example: Example, text: str, points: float, weights: Weights) -> dict[str, Any]:
    alpha = [round(float(weight), 4) for weight in weights]
    return {"id": example.id, "prediction": text, "answer": example.answer, "score": points, "weights": alpha}
