"""strata: DISCO whose tokens see the picture too, are matched whatever a client's size, and whose subspaces start warm.

Ours, on top of DISCO (Guo et al., ICCV 2025, arXiv 2503.12897). Uses task identity: no.

Three changes, each an option whose other value is DISCO:

- `token=both`: where several tasks share one prompt, text cannot tell them apart, and one subspace forgets as finetune
  does; a picture can.
- `matching=corrected`: pictures of one task differ, so the token of a client with few instructions lies far from its
  task's mean, further than another domain's mean does. Every single feature has the same norm, so a token's own norm
  says how far its instructions are spread, and the cosine can be freed of that (Spearman 1904, correction for
  attenuation): s² = (n ‖μ‖² − v) / (n − 1) estimates the squared norm of the mean over all instructions of its kind, v
  the squared norm of one feature, and μ_a · μ_b / (s_a s_b) is what the cosine would be for clients of any size.
- `start=nearest`: a new subspace starts as a copy of the one whose token is nearest, not from a fresh draw.

It uploads what DISCO does: one adapter of rank r a client-round, and a token, which with the picture is longer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fedstrata.core.adapters import Flat
from fedstrata.core.config import StrategyConfig, require
from fedstrata.core.identity import Token, cosines, pooled
from fedstrata.strategies.disco import Disco, DiscoConfig
from fedstrata.strategies.facts import Facts
from fedstrata.strategies.organisation import place

SQUARED_NORMS = {"image": 1.0, "both": 2.0}  # of one instruction's feature (`client.identity`)
MATCHINGS, STARTS = ("corrected", "plain"), ("nearest", "fresh")


@dataclass(frozen=True)
class StrataConfig(DiscoConfig):
    """Options of strata."""

    name: str = "strata"
    token: str = "both"
    tau: float | None = 0.985  # of corrected cosines: 1 within a task, 0.97 between the nearest two of fcit-mini-domain
    matching: str = "corrected"  # corrected | plain: cosines free of the clients' sizes, or as they are
    start: str = "nearest"  # nearest | fresh: where a new subspace begins

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.matching in MATCHINGS, "strategy.matching", " | ".join(MATCHINGS), self.matching)
        require(self.start in STARTS, "strategy.start", " | ".join(STARTS), self.start)
        for good, why in (
            (self.token in SQUARED_NORMS, "strategy.token=text, whose features have no common norm"),
            (not self.token_noise, "strategy.token_noise, which is in a token's norm"),
        ):
            require(good or self.matching == "plain", "strategy.matching", f"plain with {why}", self.matching)


class Strata(Disco):
    """DISCO with picture-aware tokens, matching free of client sizes, and subspaces that start warm."""

    facts: ClassVar[Facts] = Facts(grows=1, plain={"subspaces": 1}, neutral={"tau": -1})
    config_type: ClassVar[type[StrategyConfig]] = StrataConfig

    def _places(self, tokens: Sequence[Token]) -> list[int | None]:
        if self.options.matching == "plain":
            return super()._places(tokens)
        one = SQUARED_NORMS[self.options.token]
        cache = [subspace.token for subspace in self.state.subspaces]
        known = np.stack([corrected(token, one) for token in cache]) if cache else self.state.tokens()
        scaled = [Token(corrected(token, one), token.count) for token in tokens]
        return place(scaled, known, self.tau, self.options.min_open, products)

    def _start(self, subspace: int) -> Flat:
        known = self.state.subspaces
        if subspace < len(known) or not known or self.options.start == "fresh":
            return super()._start(subspace)
        group = [p.token for p in self.participants if p.token and self._placement.get(p.partition) == subspace]
        nearest = cosines(pooled(group).value[None], self.state.tokens())[0].argmax()
        return known[int(nearest)].adapter


def corrected(token: Token, one: float) -> npt.NDArray[np.float32]:
    """μ / s: its product with another such vector is the cosine of the two means over all instructions of their kinds.

    s² = (n ‖μ‖² − one) / (n − 1), one the squared norm of one feature; at least ‖μ‖² / 4, since with few instructions
    the estimate may fall to 0 or below; ‖μ‖² for a single one, which says nothing of spread.
    """
    squared, n = float(token.value.astype(np.float64) @ token.value), token.count
    if not squared:
        return token.value
    spread = max((n * squared - one) / (n - 1), squared / 4) if n > 1 else squared
    return np.asarray(token.value / np.sqrt(spread), dtype=np.float32)


def products(rows: npt.ArrayLike, columns: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Scalar products of all rows with all columns, within what a cosine can be: [N, D], [K, D] → [N, K]."""
    found = np.asarray(rows, dtype=np.float64) @ np.asarray(columns, dtype=np.float64).T
    return np.clip(found, -1.0, 1.0)
