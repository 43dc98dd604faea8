"""What cannot be fused: clients trained one after another through PEFT itself, behind the interface of a cohort's
training, and adapters that answer one at a time because no weighted sum of them is defined.

Equal to a plain loop over PEFT and torch's AdamW. Weight decay acts on PEFT's own parameters, so it pulls a magnitude
or a scale towards 0 and not towards the base's.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy

import numpy as np
import torch

from fedstrata.client.batching import batches
from fedstrata.client.dropout import Dropout
from fedstrata.client.generation import grouped
from fedstrata.client.injected import Injected, injected
from fedstrata.client.local import LocalContext
from fedstrata.client.model import BaseModel
from fedstrata.client.optimiser import BETAS, EPSILON, rate
from fedstrata.client.training import Job, Trained, passes, prepare
from fedstrata.core.adapters import Flat
from fedstrata.core.config import TrainSection
from fedstrata.core.errors import BadInput
from fedstrata.strategies.base import LocalHalf


def train(
    base: BaseModel,
    jobs: Sequence[Job],
    settings: TrainSection,
    scaling: float,
    half: LocalHalf | None = None,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
) -> list[Trained]:
    """`client.training.train`, one client after another; the local half sees each as a cohort of one.

    Raises:
        BadInput: an example that is too long, or one whose text holds the image tag's token.
    """
    draws = Dropout(dropout, base.device) if dropout else None
    with injected(base, base.layout.rank(jobs[0].flat), scaling, dtype, draws) as cohort:
        return [_train_one(base, cohort, job, settings, copy(half or LocalHalf())) for job in jobs]


def _train_one(base: BaseModel, cohort: Injected, job: Job, settings: TrainSection, half: LocalHalf) -> Trained:
    began = time.perf_counter()
    base.pictures.warm(job.examples)
    prepared = prepare(base, job, settings, half)
    plan, losses = batches(len(job.examples), settings, job.seed), []
    cohort.load(job.flat)
    optimiser = torch.optim.AdamW(
        cohort.parameters, lr=settings.lr, betas=BETAS, eps=EPSILON, weight_decay=settings.weight_decay
    )
    ctx = LocalContext(base, cohort, [job], settings, [len(plan)], [plan])
    with ctx, base.training(settings.checkpointing):
        half.begin(ctx)
        cohort.write()
        for step, rows in enumerate(plan):
            ctx.step = step
            cohort.gradient.zero_()
            losses.append(float(passes(ctx, half, [[prepared[row] for row in rows]])))
            half.on_gradients(ctx, cohort.named(cohort.gradient))
            _step(cohort, optimiser, settings, rate(settings, step + 1, len(plan)))
            half.on_step(ctx, cohort.named(cohort.flat))
            cohort.write()
        extra = ctx.apart(half.end(ctx))[0]
    flat = cohort.flat[0].detach().float().cpu().numpy().copy()
    cost = (float(np.mean(losses)), len(plan), time.perf_counter() - began)
    return Trained(flat, *cost, extra, ctx.memories[0])


def _step(cohort: Injected, optimiser: torch.optim.Optimizer, settings: TrainSection, lr: float) -> None:
    """Clipping and the optimiser's step, on PEFT's parameters."""
    if settings.max_grad_norm:
        torch.nn.utils.clip_grad_norm_(cohort.parameters, settings.max_grad_norm)
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.step()
    cohort.read()


class Switch:
    """K adapters on one frozen base, of which one at a time answers; the counterpart of `Mixture`."""

    def __init__(self, base: BaseModel, flats: Sequence[Flat], scaling: float) -> None:
        """`flats` with the layout's tail."""
        self.base, self.scaling, self.flats = base, scaling, flats
        self._open: Injected | None = None

    def activate(self, weights: torch.Tensor, tokens: int = 0) -> None:
        """Sets α [B, K] for the next forward passes: every row names the same adapter, or none.

        Raises:
            BadInput: a row that mixes several adapters.
        """
        (owner,) = set(owners(weights, self.base.layout.kind))
        assert self._open is not None, "a bank is activated while it is on the base"
        self._open.load(self.flats[max(owner, 0)])
        self._open.enable(owner >= 0)

    @contextmanager
    def on(self, base: BaseModel) -> Iterator[None]:
        """While open, the base model answers with the adapter that is active."""
        dtype = torch.promote_types(base.model.get_input_embeddings().weight.dtype, torch.float32)
        with injected(base, base.layout.rank(self.flats[0]), self.scaling, dtype) as self._open:
            try:
                yield
            finally:
                self._open = None


def batches_of(bank: object, weights: torch.Tensor, lengths: Sequence[int], size: int) -> list[list[int]]:
    """Places of the rows that are answered together, at most `size`: those of one adapter, if the bank is a `Switch`.

    weights: α [B, K]; lengths: tokens of each row's prompt.
    """
    if not isinstance(bank, Switch):
        return grouped(lengths, size)
    whose = owners(weights, bank.base.layout.kind)
    groups = [[place for place, one in enumerate(whose) if one == owner] for owner in sorted(set(whose))]
    return [[mine[i] for i in part] for mine in groups for part in grouped([lengths[p] for p in mine], size)]


def owners(weights: torch.Tensor, kind: str) -> list[int]:
    """The adapter of each row of α [B, K], −1 for none.

    Raises:
        BadInput: a row that mixes several adapters, or takes one at another weight than 1.
    """
    used = weights != 0
    if bool((used.sum(dim=1) > 1).any()) or bool((weights[used] != 1).any()):
        rule = f"adapters of kind {kind} answer one at a time at weight 1, and no sum of them is defined"
        raise BadInput(f"lora.kind: {rule}, but the router mixes them; strategy.activation=argmax works")
    return [int(row.nonzero()[0]) if bool(row.any()) else -1 for row in used]
