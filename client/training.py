"""Local training of a cohort: C clients through one frozen base in one forward and backward per step.

Every client gets what it would get alone: its own batches, loss, clipping, AdamW moments and schedule; a deployed
client is a cohort of one. Equality with a plain PEFT loop is tested.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fedstrata.client.batching import Batch, Rows, batches, collate, pieces, supervised
from fedstrata.client.dropout import Dropout
from fedstrata.client.local import LocalContext
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
    """One client's work: its examples, the adapter it starts from and the seed of its batch order and dropout.

    Attributes:
        payload: what the strategy sent beside the adapter.
        memory: what this client remembers of its earlier rounds.
    """

    examples: Sequence[Example]
    flat: Flat
    seed: int
    payload: Mapping[str, Any] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """The trained adapter; `loss` is the mean over the client's steps, `seconds` its part of the cohort's time.

    Attributes:
        extra: what the local half uploads beside the adapter.
        memory: what this client will remember.
    """

    flat: Flat
    loss: float
    steps: int
    seconds: float
    extra: Mapping[str, Any] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)


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
    ctx = LocalContext(base, cohort, [jobs[index] for index in order], settings)
    with ctx, adapted(base, cohort):
        half.begin(ctx)
        for step in range(len(plans[order[0]])):
            cohort.active = sum(len(plans[index]) > step for index in order)
            active = order[: cohort.active]
            rows = [[prepared[index][row] for row in plans[index][step]] for index in active]
            cohort.gradient.zero_()
            parts = _passes(base, cohort, rows, settings.micro_batch, half, ctx, (step, [jobs[i].seed for i in active]))
            half.on_gradients(ctx, cohort.named(cohort.gradient))
            optimiser.step(step + 1)
            half.on_step(ctx, cohort.named(cohort.flat))
            for index, value in zip(order, parts.tolist(), strict=False):
                losses[index].append(value)
    extras = ctx.apart(half.end(ctx))
    return _results(ctx, order, losses, extras, time.perf_counter() - began)


def _passes(
    base: BaseModel,
    cohort: Cohort,
    rows: Rows,
    most: int,
    half: LocalHalf,
    ctx: LocalContext,
    draws: tuple[int, Sequence[int]],
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
        piece = half.loss(ctx, batch, None, answer_loss(base, batch, cohort.active))
        torch.autograd.backward(piece.sum())
        loss = loss + piece.detach().cpu()
    return loss


def _results(
    ctx: LocalContext,
    order: Sequence[int],
    losses: Sequence[Sequence[float]],
    extras: Sequence[Mapping[str, Any]],
    seconds: float,
) -> list[Trained]:
    """In the order of the jobs; `ctx` and `extras` are in the cohort's order."""
    flats, total = ctx.cohort.flat.detach().float().cpu().numpy(), sum(map(len, losses))
    place = {index: row for row, index in enumerate(order)}
    done = []
    for index, mine in enumerate(losses):
        row = place[index]
        cost = (float(np.mean(mine)), len(mine), seconds * len(mine) / total)
        done.append(Trained(np.ascontiguousarray(flats[row]), *cost, extras[row], ctx.memories[row]))
    return done


def answer_loss(base: BaseModel, batch: Batch, clients: int) -> torch.Tensor:
    """Each client's mean cross-entropy over its answer tokens, [C]; the head runs at answer positions only."""
    hidden = base.backbone(inputs_embeds=batch.embeds, attention_mask=batch.mask, use_cache=False).last_hidden_state[
        :, :-1
    ]
    chosen = batch.weight > 0
    logits = base.head(hidden[chosen])
    nll = F.cross_entropy(
        logits.float() if logits.dtype != torch.float64 else logits, batch.labels[chosen], reduction="none"
    )
    owner = torch.nonzero(chosen)[:, 0] // batch.size
    return torch.zeros(clients, dtype=nll.dtype, device=nll.device).index_add(
        0, owner, nll * batch.weight[chosen].to(nll.dtype)
    )
