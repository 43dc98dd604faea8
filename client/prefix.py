"""Prompts: trained embeddings in front of everything that the language model reads, pictures included.

Nothing of the base is changed, so a cohort's rows simply have other prompts each. On the wire a prompt's numbers are in
units of the spread of the base's token embeddings, so that one learning rate suits bases of any scale.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from fedstrata.client.batching import Batch
from fedstrata.client.model import BaseModel, Embedded
from fedstrata.core.adapters import Flat


def before(batch: Batch, front: torch.Tensor) -> Batch:
    """A batch with `front` [rows, n, hidden] before its rows."""
    count, wide = front.shape[1], batch.mask.shape[1]
    embedded = in_front(Embedded(batch.embeds, batch.mask), front)
    places, spots = (at + count * (at // wide + 1) for at in (batch.places, batch.spots))
    return replace(batch, embeds=embedded.embeds, mask=embedded.mask, places=places, spots=spots)


def in_front(rows: Embedded, front: torch.Tensor) -> Embedded:
    """The same for rows that are not trained; where they are padded on the left, the padding is then inside."""
    embeds = torch.cat([front.to(rows.embeds.dtype), rows.embeds], dim=1)
    return Embedded(embeds, torch.cat([rows.mask.new_ones(front.shape[:2]), rows.mask], dim=1))


@dataclass
class Prompted:
    """K prompts [K, length, hidden], of which every row gets some, in the order of the pool."""

    pool: torch.Tensor
    _picks: torch.Tensor = field(default_factory=lambda: torch.zeros(1, 0, dtype=torch.int64))

    @staticmethod
    def of(base: BaseModel, flats: Sequence[Flat]) -> "Prompted":
        pool = np.concatenate([base.layout.views(flat)["prompts"] for flat in flats])
        weight = base.model.get_input_embeddings().weight
        return Prompted(base.spread * torch.from_numpy(pool).to(weight.device, weight.dtype))

    def activate(self, weights: torch.Tensor, tokens: int = 0) -> None:
        """Rows of α [B, K] get the prompts whose weight is above 0. Raises ValueError unless all get equally many."""
        used = weights > 0
        counts = used.sum(dim=1)
        if bool((counts != counts[:1]).any()):
            raise ValueError(f"every row must get equally many prompts, got {counts.tolist()}")
        self._picks = used.nonzero()[:, 1].view(len(used), -1).to(self.pool.device)

    @contextmanager
    def on(self, base: BaseModel) -> Iterator[None]:
        """While open, what the base embeds has the active prompts in front."""
        plain = base.embed

        def embed(rows: Sequence[Sequence[int]], features: Sequence[torch.Tensor | None], left: bool) -> Embedded:
            front = self.pool[self._picks].flatten(1, 2)
            return in_front(plain(rows, features, left), front.expand(len(rows), -1, -1))

        vars(base)["embed"] = embed
        try:
            yield
        finally:
            del vars(base)["embed"]
