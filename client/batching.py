"""Which rows a step trains, in how many pieces, and the fused tensors of a cohort's rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from fedstrata.client.features import features_of
from fedstrata.client.model import BaseModel, Embedded
from fedstrata.client.prompts import Prepared
from fedstrata.core.config import TrainSection
from fedstrata.core.seeds import generator

Rows = Sequence[Sequence[Prepared]]  # per client
Places = Sequence[Sequence[int]]  # per client, where its rows stand in its batch

PASS_TOKENS = 512  # padded tokens that one more forward and backward must save; measured at hidden 64, where a pass
# of two layers costs as much as 300, so that at larger bases it is certain to pay
CACHED = 2**19  # numbers of one hidden state; measured at hidden 256: 8 clients of 256 tokens beat 16 and 4


@dataclass(frozen=True)
class Batch:
    """One forward pass: rows are client-major, `size` per client; N answer tokens of all rows are supervised.

    Attributes:
        embeds: [C·size, L, hidden].
        mask: [C·size, L], 1 where there is a token.
        places: [N], the position before each answer token, counted through [C·size · L].
        labels: [N], the answer tokens.
        owner: [N], whose they are: 0 … C − 1.
        weight: [N], 1 / answer tokens of the client's whole step.
        spots: [C, most], each client's places, filled up with its last position, which no answer is read from.
        rows: [C·size], what it was made of.
        part: of how many equal parts of the step this is one; a penalty that a local half adds belongs into each,
            times `part`, so that it counts once.
    """

    embeds: torch.Tensor
    mask: torch.Tensor
    places: torch.Tensor
    labels: torch.Tensor
    owner: torch.Tensor
    weight: torch.Tensor
    spots: torch.Tensor
    size: int
    rows: Sequence[Prepared] = ()
    part: float = 1.0

    def added(self, loss: torch.Tensor, each: torch.Tensor) -> torch.Tensor:
        """The loss [C] and, on top, each client's mean of `each` [N] over the answer tokens of its whole step."""
        return loss.index_add(0, self.owner, (each * self.weight).to(loss.dtype))

    @property
    def line(self) -> torch.Tensor:
        """[N], the row that each answer token stands in."""
        return self.places // self.mask.shape[1]

    @property
    def queries(self) -> torch.Tensor:
        """[C·size, D], what the local half's `features` gave for the rows."""
        found = [row.query for row in self.rows if row.query is not None]
        return torch.stack(found).to(self.embeds.device)


def batches(count: int, settings: TrainSection, seed: int) -> list[list[int]]:
    """Row indices of every step: each epoch a new order, the last batch of an epoch may be smaller."""
    plan, size = [], settings.batch_size
    for epoch in range(settings.local_epochs):
        rows = generator(seed, "epoch", epoch).permutation(count).tolist()
        plan += [rows[start : start + size] for start in range(0, count, size)]
    return plan


def group_size(rows: Rows, hidden: int) -> int:
    """How many clients a CPU takes at once: groups of equal size whose hidden states stay within `CACHED`."""
    numbers = len(rows) * max(map(len, rows)) * max(length(row) for mine in rows for row in mine) * hidden
    groups = min(len(rows), math.ceil(numbers / CACHED))
    return math.ceil(len(rows) / groups)


def pieces(rows: Rows, most: int) -> list[tuple[Places, Rows]]:
    """One step's rows in pieces of at most `most` per client (0: no limit), each to be padded for itself.

    Rows go by length where that saves more padding than further passes cost, else in their order: a function of the
    rows' lengths alone. A client can have none of a piece.
    """
    lengths = [[length(row) for row in mine] for mine in rows]
    count = max(map(len, rows))
    straight = [list(range(len(mine))) for mine in rows]
    falling = [sorted(order, key=mine.__getitem__, reverse=True) for order, mine in zip(straight, lengths, strict=True)]
    plain = [*range(0, count, most or count), count]
    ways = [(straight, plain), (falling, _cuts(_widths(lengths, falling, count), most or count, len(rows)))]
    order, cuts = min(ways, key=lambda way: _cost(lengths, *way))  # the first of two that cost the same
    return [_piece(rows, order, first, last) for first, last in pairwise(cuts)]


def length(row: Prepared) -> int:
    """Tokens of a row."""
    return len(row.prompt) + len(row.answer)


def _piece(rows: Rows, order: Places, first: int, last: int) -> tuple[Places, Rows]:
    places = [mine[first:last] for mine in order]
    return places, [[mine[place] for place in own] for mine, own in zip(rows, places, strict=True)]


def _cost(lengths: Places, order: Places, cuts: Sequence[int]) -> int:
    """Padded tokens of all pieces, and what their passes cost."""
    widths = _widths(lengths, order, cuts[-1])
    padded = sum((last - first) * max(widths[first:last]) for first, last in pairwise(cuts))
    return len(lengths) * padded + PASS_TOKENS * (len(cuts) - 1)


def _widths(lengths: Places, order: Places, count: int) -> list[int]:
    """The longest of all clients' first rows in this order, of their second rows, …"""
    rows = [[mine[place] for place in own] for mine, own in zip(lengths, order, strict=True)]
    return [max(mine[k] for mine in rows if k < len(mine)) for k in range(count)]


def _cuts(widths: Sequence[int], most: int, clients: int) -> list[int]:
    """Where to cut falling widths into pieces of at most `most`, so that padding and passes cost least."""
    best = [0] + [0] * len(widths)  # the least cost of the first n rows
    before = [0] * len(best)  # where their last piece begins
    for last in range(1, len(best)):
        starts = range(max(0, last - most), last)
        costs = [best[s] + clients * (last - s) * widths[s] + PASS_TOKENS for s in starts]
        best[last] = min(costs)
        before[last] = starts[costs.index(best[last])]
    cuts = [len(widths)]
    while cuts[-1]:
        cuts.append(before[cuts[-1]])
    return cuts[::-1]


def supervised(rows: Rows) -> list[int]:
    """Per client the answer tokens of its rows."""
    return [sum(sum(row.supervised) for row in mine) for mine in rows]


def collate(base: BaseModel, rows: Rows, totals: Sequence[int] = (), part: float = 1.0) -> Batch:
    """Pads clients with fewer rows by rows without supervised tokens, so that every client owns equally many.

    totals: per client the answer tokens of its whole step; (): `rows` are whole steps.
    """
    size, spare = max(map(len, rows)), next(row for mine in rows for row in mine)
    flat = [row for mine in rows for row in (*mine, *[mine[0] if mine else spare] * (size - len(mine)))]
    embedded = embedded_rows(base, flat)
    wide, totals = embedded.mask.shape[1], totals or supervised(rows)
    places: list[list[int]] = [[] for _ in rows]
    labels: list[int] = []
    for client, mine in enumerate(rows):
        for index, row in enumerate(mine, client * size):
            start = index * wide + len(row.prompt) - 1
            places[client] += [start + k for k, said in enumerate(row.supervised) if said]
            labels += [token for token, said in zip(row.answer, row.supervised, strict=True) if said]
    most, owner = max(map(len, places)), [client for client, mine in enumerate(places) for _ in mine]
    spots = [mine + [(c + 1) * size * wide - 1] * (most - len(mine)) for c, mine in enumerate(places)]
    weight = [1 / totals[client] for client in owner]
    each = [place for mine in places for place in mine]
    numbers = (each, labels, owner, weight, spots)
    at, says, whose, counts, some = (torch.from_numpy(np.array(n)).to(base.device) for n in numbers)
    return Batch(embedded.embeds, embedded.mask, at, says, whose, counts, some, size, flat, part)


def embedded_rows(base: BaseModel, rows: Sequence[Prepared]) -> Embedded:
    """Questions with their answers, padded on the right."""
    return base.embed([row.prompt + row.answer for row in rows], features_of(base.pictures, rows), left=False)
