"""Local training of a cohort: C clients through one frozen base in one forward and backward per step.

Every client gets what it would get alone: its own batches, loss, clipping, AdamW moments and schedule; a deployed
client is a cohort of one. Equality with a plain PEFT loop is tested.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from fedstrata.client.batching import Batch, Rows, batches, collate, pieces, supervised
from fedstrata.client.dropout import Dropout
from fedstrata.client.lora import Cohort, adapted
from fedstrata.client.model import BaseModel
from fedstrata.client.optimiser import AdamW
from fedstrata.core.adapters import Flat
from fedstrata.core.config import TrainSection
from fedstrata.scenarios.stream import Example
from fedstrata.strategies.base import LocalHalf

__all__ = ["Job", "Trained", "answer_loss", "batches", "collate", "train"]


@dataclass(frozen=True)
class Job:
    """One client's work: its examples, the adapter it starts from and the seed of its batch order and dropout."""

    examples: Sequence[Example]
    flat: Flat
    seed: int


@dataclass(frozen=True)
class Trained:
    """The trained adapter; `loss` is the mean over the client's steps, `seconds` its part of the cohort's time."""

    flat: Flat
    loss: float
    steps: int
    seconds: float


def train(
    base: BaseModel,
    jobs: Sequence[Job],
    settings: TrainSection,
    scaling: float,
    half: LocalHalf | None = None,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
) -> list[Trained]:
    """Trains all jobs as one cohort; results are in the order of the jobs. Every job needs at least one example.

    Raises:
        BadInput: an example that is too long, or one whose text holds the image tag's token.
    """
    began = time.perf_counter()
    half = half or LocalHalf()
    for job in jobs:
        base.pictures.warm(job.examples)
    prepared = [base.tokenise(job.examples, settings.max_length, settings.overlong) for job in jobs]
    plans = [batches(len(job.examples), settings, job.seed) for job in jobs]
    order = sorted(range(len(jobs)), key=lambda index: -len(plans[index]))  # stable: who has more steps comes first
    cohort = Cohort.of([jobs[index].flat for index in order], base.layout, scaling, base.device, dtype)
    cohort.dropout = Dropout(dropout, base.device) if dropout else None
    optimiser = AdamW(cohort, settings, [len(plans[index]) for index in order])
    losses: list[list[float]] = [[] for _ in jobs]
    half.begin(cohort)
    with adapted(base, cohort):
        for step in range(len(plans[order[0]])):
            cohort.active = sum(len(plans[index]) > step for index in order)
            active = order[: cohort.active]
            rows = [[prepared[index][row] for row in plans[index][step]] for index in active]
            cohort.gradient.zero_()
            parts = _passes(base, cohort, rows, settings.micro_batch, half, (step, [jobs[i].seed for i in active]))
            half.on_gradients(cohort, cohort.named(cohort.gradient))
            optimiser.step(step + 1)
            half.on_step(cohort, cohort.named(cohort.flat))
            for index, value in zip(order, parts.tolist(), strict=False):
                losses[index].append(value)
    half.end(cohort)
    return _results(cohort, order, losses, time.perf_counter() - began)


def _passes(
    base: BaseModel, cohort: Cohort, rows: Rows, most: int, half: LocalHalf, draws: tuple[int, Sequence[int]]
) -> torch.Tensor:
    """Forward and backward of one step in pieces of at most `most` rows per client; the loss [C] of the whole step.

    draws: the step's number and each client's seed, for the dropout.
    """
    totals, loss = supervised(rows), torch.zeros(())
    parts = list(pieces(rows, most))
    for first, mine in parts:
        if cohort.dropout is not None:
            lengths = [[len(row.prompt) + len(row.answer) for row in own] for own in mine]
            cohort.dropout.begin(lengths, draws[1], draws[0], first)
        batch = collate(base, mine, totals, 1 / len(parts))
        piece = half.loss(cohort, batch, None, answer_loss(base, batch, cohort.active))
        torch.autograd.backward(piece.sum())
        loss = loss + piece.detach().cpu()
    return loss


def _results(cohort: Cohort, order: Sequence[int], losses: Sequence[Sequence[float]], seconds: float) -> list[Trained]:
    flats, total = cohort.flat.detach().float().cpu().numpy(), sum(map(len, losses))
    place = {index: row for row, index in enumerate(order)}
    return [
        Trained(np.ascontiguousarray(flats[place[index]]), float(np.mean(mine)), len(mine), seconds * len(mine) / total)
        for index, mine in enumerate(losses)
    ]


def answer_loss(base: BaseModel, batch: Batch, clients: int) -> torch.Tensor:
    """Each client's mean cross-entropy over its answer tokens, [C]; the head runs at answer positions only."""
    language = base.model.model.language_model
    hidden = language(inputs_embeds=batch.embeds, attention_mask=batch.mask, use_cache=False).last_hidden_state[:, :-1]
    chosen = batch.weight > 0
    logits = base.model.lm_head(hidden[chosen])
    nll = F.cross_entropy(
        logits.float() if logits.dtype != torch.float64 else logits, batch.labels[chosen], reduction="none"
    )
    owner = torch.nonzero(chosen)[:, 0] // batch.size
    return torch.zeros(clients, dtype=nll.dtype, device=nll.device).index_add(
        0, owner, nll * batch.weight[chosen].to(nll.dtype)
    )
