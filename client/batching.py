"""Which rows a step trains, and the fused tensors of a cohort's rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fedstrata.client.features import features_of
from fedstrata.client.model import BaseModel
from fedstrata.client.prompts import Prepared
from fedstrata.core.config import TrainSection
from fedstrata.core.seeds import generator

Rows = Sequence[Sequence[Prepared]]  # per client


@dataclass(frozen=True)
class Batch:
    """One forward pass: `rows` client-major, `size` rows per client; `weight` [C·size, L−1] is 1/answer tokens of the
    client's batch where the next token is supervised, else 0.

    part: of how many equal parts of the step this is one; a penalty that a local half adds belongs into each, times
    `part`, so that it counts once.
    """

    embeds: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    weight: torch.Tensor
    size: int
    part: float = 1.0


def batches(count: int, settings: TrainSection, seed: int) -> list[list[int]]:
    """Row indices of every step: each epoch a new order, the last batch of an epoch may be smaller."""
    plan, size = [], settings.batch_size
    for epoch in range(settings.local_epochs):
        rows = generator(seed, "epoch", epoch).permutation(count).tolist()
        plan += [rows[start : start + size] for start in range(0, count, size)]
    return plan


def pieces(rows: Rows, most: int) -> Iterator[tuple[int, Rows]]:
    """(first row, at most `most` rows per client from there); 0: all at once. A client can have none of a piece."""
    longest = max(map(len, rows))
    step = most or longest
    for start in range(0, longest, step):
        yield start, [mine[start : start + step] for mine in rows]


def supervised(rows: Rows) -> list[int]:
    """Per client the answer tokens of its rows."""
    return [sum(sum(row.supervised) for row in mine) for mine in rows]


def collate(base: BaseModel, rows: Rows, totals: Sequence[int] = (), part: float = 1.0) -> Batch:
    """Pads clients with fewer rows by rows of weight 0, so that every client owns equally many.

    totals: per client the answer tokens of its whole step; (): `rows` are whole steps.
    """
    size, spare = max(map(len, rows)), next(row for mine in rows for row in mine)
    flat = [row for mine in rows for row in (*mine, *[mine[0] if mine else spare] * (size - len(mine)))]
    embedded = base.embed([row.prompt + row.answer for row in flat], features_of(base.pictures, flat), left=False)
    length = embedded.mask.shape[1]
    labels = torch.zeros(len(flat), length - 1, dtype=torch.long)
    weight = torch.zeros(len(flat), length - 1, dtype=torch.float64)
    for client, (mine, tokens) in enumerate(zip(rows, totals or supervised(rows), strict=True)):
        for index, row in enumerate(mine, client * size):
            where = slice(len(row.prompt) - 1, len(row.prompt) - 1 + len(row.answer))
            labels[index, where] = torch.tensor(row.answer)
            weight[index, where] = torch.tensor(row.supervised, dtype=torch.float64) / tokens
    return Batch(embedded.embeds, embedded.mask, labels.to(base.device), weight.to(base.device), size, part)
