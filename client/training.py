"""Local training of a cohort: C clients through one frozen base in one forward and backward per step.

Every client gets what it would get alone: its own batches, loss, clipping, AdamW moments and schedule; a deployed
client is a cohort of one. Equality with a plain PEFT loop is tested.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from fedstrata.client.lora import Cohort, adapted
from fedstrata.client.model import BaseModel, Prepared
from fedstrata.core.adapters import Flat
from fedstrata.core.config import TrainSection
from fedstrata.core.seeds import generator
from fedstrata.scenarios.stream import Example
from fedstrata.strategies.base import LocalHalf

BETAS, EPSILON = (0.9, 0.999), 1e-8  # torch.optim.AdamW's own


@dataclass(frozen=True)
class Job:
    """One client's work: its examples, the adapter it starts from and the seed of its batch order."""

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


@dataclass(frozen=True)
class Batch:
    """One fused step: `rows` client-major, `size` rows per client; `weight` [C·size, L−1] is 1/answer tokens of the
    client's batch where the next token is supervised, else 0."""

    embeds: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    weight: torch.Tensor
    size: int


def train(
    base: BaseModel,
    jobs: Sequence[Job],
    settings: TrainSection,
    scaling: float,
    half: LocalHalf | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Trained]:
    """Trains all jobs as one cohort; results are in the order of the jobs. Every job needs at least one example."""
    began = time.perf_counter()
    half = half or LocalHalf()
    prepared = [base.prepare(job.examples, settings.max_length) for job in jobs]
    plans = [batches(len(job.examples), settings, job.seed) for job in jobs]
    order = sorted(range(len(jobs)), key=lambda index: -len(plans[index]))  # stable: who has more steps comes first
    cohort = Cohort.of([jobs[index].flat for index in order], base.layout, scaling, base.device, dtype)
    optimiser = AdamW(cohort, settings)
    losses: list[list[float]] = [[] for _ in jobs]
    half.begin(cohort)
    with adapted(base, cohort):
        for step in range(len(plans[order[0]])):
            cohort.active = sum(len(plans[index]) > step for index in order)
            rows = [[prepared[index][row] for row in plans[index][step]] for index in order[: cohort.active]]
            batch = collate(base, rows)
            loss = half.loss(cohort, batch, None, answer_loss(base, batch, cohort.active))
            cohort.gradient.zero_()
            torch.autograd.backward(loss.sum())
            half.on_gradients(cohort, cohort.named(cohort.gradient))
            optimiser.step(step + 1)
            half.on_step(cohort, cohort.named(cohort.flat))
            for index, value in zip(order, loss.tolist(), strict=False):
                losses[index].append(value)
    half.end(cohort)
    return _results(cohort, order, losses, time.perf_counter() - began)


def _results(cohort: Cohort, order: Sequence[int], losses: Sequence[Sequence[float]], seconds: float) -> list[Trained]:
    flats, total = cohort.flat.detach().float().cpu().numpy(), sum(map(len, losses))
    place = {index: row for row, index in enumerate(order)}
    return [
        Trained(np.ascontiguousarray(flats[place[index]]), float(np.mean(mine)), len(mine), seconds * len(mine) / total)
        for index, mine in enumerate(losses)
    ]


def batches(count: int, settings: TrainSection, seed: int) -> list[list[int]]:
    """Row indices of every step: each epoch a new order, the last batch of an epoch may be smaller."""
    plan, size = [], settings.batch_size
    for epoch in range(settings.local_epochs):
        rows = generator(seed, "epoch", epoch).permutation(count).tolist()
        plan += [rows[start : start + size] for start in range(0, count, size)]
    return plan


def collate(base: BaseModel, rows: Sequence[Sequence[Prepared]]) -> Batch:
    """Pads clients with fewer rows by rows of weight 0, so that every client owns equally many."""
    size = max(len(mine) for mine in rows)
    flat = [row for mine in rows for row in (*mine, *[mine[0]] * (size - len(mine)))]
    embedded = base.embed([row.prompt + row.answer for row in flat], [row.features for row in flat], left=False)
    length = embedded.mask.shape[1]
    labels = torch.zeros(len(flat), length - 1, dtype=torch.long)
    weight = torch.zeros(len(flat), length - 1, dtype=torch.float64)
    for client, mine in enumerate(rows):
        tokens = sum(len(row.answer) for row in mine)
        for index, row in enumerate(mine, client * size):
            where = slice(len(row.prompt) - 1, len(row.prompt) - 1 + len(row.answer))
            labels[index, where] = torch.tensor(row.answer)
            weight[index, where] = 1 / tokens
    return Batch(embedded.embeds, embedded.mask, labels.to(base.device), weight.to(base.device), size)


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


class AdamW:
    """torch.optim.AdamW for every client at once: all its arithmetic is elementwise, so it stacks along C."""

    def __init__(self, cohort: Cohort, settings: TrainSection) -> None:
        self.cohort, self.settings = cohort, settings
        self.mean = torch.zeros_like(cohort.flat)
        self.square = torch.zeros_like(cohort.flat)

    @torch.no_grad()
    def step(self, number: int) -> None:
        """Step `number` (from 1) of the active clients; the others' values and moments keep their bits."""
        s, active = self.settings, self.cohort.active
        theta, gradient = self.cohort.flat[:active], self.cohort.gradient[:active]
        if s.max_grad_norm:
            norms = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
            gradient = gradient * (s.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
        lr = s.lr * min(1.0, number / max(1, s.warmup_steps))
        mean, square = self.mean[:active], self.square[:active]
        mean.lerp_(gradient, 1 - BETAS[0])
        square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        theta.mul_(1 - lr * s.weight_decay)
        root = (square.sqrt() / math.sqrt(1 - BETAS[1] ** number)).add_(EPSILON)
        theta.addcdiv_(mean, root, value=-lr / (1 - BETAS[0] ** number))
