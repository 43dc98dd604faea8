"""Additive statistics of a cohort's clients: what a method needs to know of their data beside their adapters."""

from collections.abc import Sequence

import torch

from fedstrata.client.batching import collate
from fedstrata.client.local import LocalContext
from fedstrata.client.tokens import tokens
from fedstrata.client.training import answer_loss
from fedstrata.core.seeds import generator
from fedstrata.scenarios.stream import Example


def squares(ctx: LocalContext, most: int = 0) -> torch.Tensor:
    """E[g²] [C, size]: the mean over a client's examples of the squared gradient of that example's loss.

    A mean over a batch would be squared too late, so every pass holds one example of each client: the leading client
    dimension keeps their gradients apart. Without dropout, at the present values.

    Args:
        ctx: the cohort; its gradients are overwritten.
        most: at most so many examples of a client, drawn from its job's seed; 0: all.
    """
    cohort, settings = ctx.cohort, ctx.settings
    chosen = [_some(job.examples, job.seed, most) for job in ctx.jobs]
    rows = [tokens(ctx.base, mine, settings) for mine in chosen]
    total, dropout = torch.zeros_like(cohort.gradient), cohort.dropout
    cohort.active, cohort.dropout = len(rows), None
    for index in range(max(map(len, rows))):
        cohort.gradient.zero_()
        batch = collate(ctx.base, [mine[index : index + 1] for mine in rows])  # a client without one gets weight 0
        torch.autograd.backward(answer_loss(ctx.base, batch, cohort.active).sum())
        total.addcmul_(cohort.gradient, cohort.gradient)
    cohort.dropout = dropout
    return total / torch.tensor([[len(mine)] for mine in rows], device=total.device)


def _some(examples: Sequence[Example], seed: int, most: int) -> list[Example]:
    if not most or len(examples) <= most:
        return list(examples)
    return [examples[row] for row in generator(seed, "statistics").permutation(len(examples))[:most].tolist()]
