"""Local training of a cohort: C clients through one frozen base in one forward and backward per step.

Every client gets what it would get alone: its own batches, loss, clipping, AdamW moments and schedule; a deployed
client is a cohort of one. Equality with a plain PEFT loop is tested.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fedstrata.client.answers import answer_logits, answers_only
from fedstrata.client.batching import Batch, Rows, batches, collate, group_size, length, pieces, supervised
from fedstrata.client.dropout import Dropout
from fedstrata.client.local import LocalContext
from fedstrata.client.lora import Cohort, adapted
from fedstrata.client.model import BaseModel
from fedstrata.client.optimiser import AdamW
from fedstrata.client.prompts import Prepared
from fedstrata.client.tokens import tokens
from fedstrata.core.adapters import STACKED, Flat
from fedstrata.core.config import TrainSection
from fedstrata.scenarios.stream import Example
from fedstrata.strategies.base import LocalHalf

__all__ = ["Job", "Trained", "answer_loss", "batches", "collate", "train"]


@dataclass(frozen=True)
class Job:
    """One client's work: its examples, the adapter it starts from and the seed of its batch order and dropout.

    Attributes:
        options: the scalars that the strategy sent with the adapter.
        payload: the arrays that it sent beside the adapter.
        memory: what this client remembers of its earlier rounds.
    """

    examples: Sequence[Example]
    flat: Flat
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)
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
    if base.layout.kind not in STACKED:
        from fedstrata.client import alone  # it needs this module's loss

        return alone.train(base, jobs, settings, scaling, half, dtype, dropout)
    began = time.perf_counter()
    half = half or LocalHalf()
    for job in jobs:
        base.pictures.warm(job.examples)
    prepared = [prepare(base, job, settings, half) for job in jobs]
    plans = [batches(len(job.examples), settings, job.seed) for job in jobs]
    order = sorted(range(len(jobs)), key=lambda index: -len(plans[index]))  # stable: who has more steps comes first
    steps = [len(plans[index]) for index in order]
    cohort = Cohort.of([jobs[index].flat for index in order], base.layout, scaling, base.device, dtype)
    cohort.dropout = Dropout(dropout, base.device) if dropout else None
    optimiser = AdamW(cohort, settings, steps)
    ctx = LocalContext(
        base, cohort, [jobs[index] for index in order], settings, steps, [plans[index] for index in order]
    )
    losses = []
    with adapted(base, cohort), base.training(settings.checkpointing), ctx:  # what a hook opens closes first
        half.begin(ctx)
        for step in range(steps[0]):
            ctx.step, cohort.active = step, sum(count > step for count in steps)
            rows = [[prepared[index][row] for row in plans[index][step]] for index in order[: cohort.active]]
            cohort.gradient.zero_()
            losses.append(passes(ctx, half, rows))
            if _has(half, "on_gradients"):
                half.on_gradients(ctx, cohort.named(cohort.gradient))
            optimiser.step(step + 1)
            if _has(half, "on_step"):
                half.on_step(ctx, cohort.named(cohort.flat))
        cohort.active = len(jobs)
        extras = ctx.apart(half.end(ctx))
    return _results(ctx, order, losses, extras, time.perf_counter() - began)


def prepare(base: BaseModel, job: Job, settings: TrainSection, half: LocalHalf) -> list[Prepared]:
    """The job's rows with what the local half wants to know of them."""
    rows, known = tokens(base, job.examples, settings), half.features(base, job.examples)
    if known is None:
        return rows
    return [replace(row, query=query) for row, query in zip(rows, known, strict=True)]


def _has(half: LocalHalf, hook: str) -> bool:
    """Whether a method has a hook of its own: views for one that does nothing are not made."""
    return getattr(type(half), hook) is not getattr(LocalHalf, hook)


def passes(ctx: LocalContext, half: LocalHalf, rows: Rows) -> torch.Tensor:
    """Forward and backward of one step; the loss [active] of the whole step.

    On a CPU a wide base's clients go in groups whose hidden states stay in its caches. A method with a loss or
    a batch of its own is asked for all clients at once.
    """
    model, own = ctx.base.model, _has(half, "loss") or _has(half, "batch")
    grouped = ctx.base.device.type == "cpu" and not own
    size = group_size(rows, model.config.get_text_config().hidden_size) if grouped else len(rows)
    losses = []
    for first in range(0, len(rows), size):
        with ctx.cohort.only(first, min(first + size, len(rows))):
            losses.append(_pieces(ctx, half, rows[first : first + size], ctx.jobs[first:]))
    return torch.cat(losses)


def _pieces(ctx: LocalContext, half: LocalHalf, rows: Rows, jobs: Sequence[Job]) -> torch.Tensor:
    """Forward and backward of some clients' step, piece by piece; their losses."""
    base, cohort, totals, losses = ctx.base, ctx.cohort, supervised(rows), []
    parts = pieces(rows, ctx.settings.micro_batch)
    for places, mine in parts:
        if cohort.dropout is not None:
            lengths = [[length(row) for row in own] for own in mine]
            cohort.dropout.begin(lengths, [job.seed for job in jobs[: len(rows)]], ctx.step, places)
        batch = half.batch(ctx, collate(base, mine, totals, 1 / len(parts)))
        with nullcontext() if cohort.dropout else answers_only(base, batch):  # what is drawn depends on positions
            out = answer_logits(base, batch)
            piece = half.loss(ctx, batch, out, mean_loss(out, batch, len(rows)))
            torch.autograd.backward(piece.sum())
        losses.append(piece.detach())
    return sum(losses[1:], losses[0])


def _results(
    ctx: LocalContext,
    order: Sequence[int],
    losses: Sequence[torch.Tensor],
    extras: Sequence[Mapping[str, Any]],
    seconds: float,
) -> list[Trained]:
    """In the order of the jobs; `ctx` and `extras` are in the cohort's order, `losses` [active] are per step."""
    flats, total = ctx.cohort.flat.detach().float().cpu().numpy(), sum(ctx.steps)
    told = [loss.tolist() for loss in losses]  # once, behind the last step: a GPU is not waited for in between
    done = {}
    for row, index in enumerate(order):
        mine = [loss[row] for loss in told[: ctx.steps[row]]]
        cost = (float(np.mean(mine)), len(mine), seconds * len(mine) / total)
        done[index] = Trained(np.ascontiguousarray(flats[row]), *cost, extras[row], ctx.memories[row])
    return [done[index] for index in range(len(order))]


def answer_loss(base: BaseModel, batch: Batch, clients: int) -> torch.Tensor:
    """Each client's mean cross-entropy over its answer tokens, [C]."""
    return mean_loss(answer_logits(base, batch), batch, clients)


def mean_loss(logits: torch.Tensor, batch: Batch, clients: int) -> torch.Tensor:
    """The same of logits [N, vocabulary]."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    nll = F.cross_entropy(logits.to(wide), batch.labels, reduction="none")
    weighted = nll * batch.weight.to(wide)
    return torch.zeros(clients, dtype=wide, device=nll.device).index_add(0, batch.owner, weighted)
