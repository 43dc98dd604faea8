"""The client's half of `strategy.compat=official`: what DISCO's published training does with steps and batches.

Defects D7 and D9 of `strategies/official.py`, whose first paragraphs say what they are. The optimiser's moments are a
client's, whichever subspace a batch trains.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedstrata.core.identity import cosines
from fedstrata.strategies.base import LocalHalf

if TYPE_CHECKING:
    from torch import Tensor

SLOTS, TOKENS, TAU = "slots", "tokens", "tau"  # of all subspaces and a free one; of the subspaces; the threshold


class Published(LocalHalf):
    """D7: behind the first optimiser step the parameters are what they were. D9: batches pick their subspaces."""

    def begin(self, ctx: Any) -> None:
        sent = ctx.sent(SLOTS)
        self.slots: Any = None if sent is None else sent.clone()  # [C, K + 1, size]
        self.picks = [] if sent is None else [self._picks(ctx, row) for row in range(len(ctx.jobs))]
        self._load(ctx, 0)
        self.first: Tensor | None = ctx.cohort.flat.detach().clone()

    def _picks(self, ctx: Any, row: int) -> list[int]:
        job = ctx.jobs[row]
        features = ctx.base.encode(job.examples, self.options.token).float().cpu().numpy()
        means = np.stack([features[list(places)].mean(0) for places in ctx.plans[row]])
        return picked(means, job.payload[TOKENS], float(job.payload[TAU][0]))

    def on_step(self, ctx: Any, parameters: Mapping[str, "Tensor"]) -> None:
        flat = ctx.cohort.flat.detach()
        if self.first is not None:
            flat[: ctx.cohort.active] = self.first[: ctx.cohort.active]
            self.first = None
        for row, picks in enumerate(self.picks[: ctx.cohort.active]):
            self.slots[row, picks[ctx.step]] = flat[row, : self.slots.shape[2]]
        self._load(ctx, ctx.step + 1)

    def _load(self, ctx: Any, step: int) -> None:
        """The subspaces that this step's batches train; a tail that all share stays."""
        for row, picks in enumerate(self.picks):
            if step < len(picks):
                ctx.cohort.flat.detach()[row, : self.slots.shape[2]] = self.slots[row, picks[step]]

    def end(self, ctx: Any) -> Mapping[str, "Tensor"]:
        if self.slots is None:
            return {}
        for row, job in enumerate(ctx.jobs):
            own = min(int(job.options["subspace"]), self.slots.shape[1] - 1)
            ctx.cohort.flat.detach()[row, : self.slots.shape[2]] = self.slots[row, own]
        return {SLOTS: self.slots}


def picked(means: npt.ArrayLike, tokens: npt.NDArray[np.float32], tau: float) -> list[int]:
    """For each batch mean [S, D] the most similar of K tokens where that cosine is above τ, else K: the free one."""
    similar = cosines(means, tokens)
    return [int(row.argmax()) if row.max() > tau else len(tokens) for row in similar]
