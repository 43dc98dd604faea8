"""AdamW and learning rates of a cohort: each client has its own steps, and so its own schedule."""

import math
from collections.abc import Sequence
from itertools import groupby

import torch
from torch.optim.adamw import adamw

from fedstrata.client.lora import Cohort
from fedstrata.core.config import TrainSection

BETAS, EPSILON = (0.9, 0.999), 1e-8  # torch.optim.AdamW's own


def warmup(settings: TrainSection, steps: int) -> int:
    """Warm-up steps of a client with this many steps."""
    return math.ceil(settings.warmup_ratio * steps) if settings.warmup_ratio else settings.warmup_steps


def rate(settings: TrainSection, number: int, steps: int) -> float:
    """Learning rate of step `number` (from 1) of a client's `steps`.

    Behind the warm-up the cosine is that of transformers' get_cosine_schedule_with_warmup, which reaches 0 only after
    the last step.
    """
    warm = warmup(settings, steps)
    if settings.schedule == "constant" or number <= warm:
        return settings.lr * min(1.0, number / max(1, warm))
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (number - 1 - warm) / (steps - warm)))


class AdamW:
    """torch.optim.AdamW for every client at once: all its arithmetic is elementwise, so it stacks along C."""

    def __init__(self, cohort: Cohort, settings: TrainSection, steps: Sequence[int]) -> None:
        """steps: of each client, in the cohort's order."""
        self.cohort, self.settings, self.steps = cohort, settings, steps
        self.mean = torch.zeros_like(cohort.flat)
        self.square = torch.zeros_like(cohort.flat)

    @torch.no_grad()
    def step(self, number: int) -> None:
        """Step `number` (from 1) of the active clients; the others' values and moments keep their bits."""
        settings, active = self.settings, self.cohort.active
        if settings.max_grad_norm:
            gradient = self.cohort.gradient[:active]
            norms = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
            gradient.mul_((settings.max_grad_norm / (norms + 1e-6)).clamp_(max=1.0))
        rates = [rate(settings, number, steps) for steps in self.steps[:active]]
        first = 0
        for lr, same in groupby(rates):
            last = first + len(list(same))
            self._move(slice(first, last), lr, number)
            first = last

    def _move(self, who: slice, lr: float, number: int) -> None:
        """torch's own step, in one pass over the rows of clients with one learning rate."""
        tensors = (self.cohort.flat, self.cohort.gradient, self.mean, self.square)
        values, gradients, means, squares = ([tensor[who].detach()] for tensor in tensors)
        done = torch.full((), float(number - 1), device=self.cohort.flat.device)  # torch counts it up
        adamw(
            values,
            gradients,
            means,
            squares,
            max_exp_avg_sqs=[],
            state_steps=[done],
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=lr,
            weight_decay=self.settings.weight_decay,
            eps=EPSILON,
            maximize=False,
        )
