"""strata: DISCO that looks at the picture too, whatever a client's size, and whose subspaces start warm.

Ours, on top of DISCO (Guo et al., ICCV 2025, arXiv 2503.12897). Uses task identity: no.

Two changes, each an option whose other value is DISCO:

- `token=both`: where several tasks share one prompt, text cannot tell them apart, and one subspace forgets as finetune
  does; a picture can. A participant joins a subspace whose text matches as in DISCO (cosine ≥ `tau`) and whose pictures
  match (≥ `picture_tau`); so strata's subspaces refine DISCO's, and without pictures they are DISCO's.
  With `matching=corrected` the pictures' cosine is freed of the clients' sizes: pictures of one task differ, so the
  mean over a client's few lies farther from its task's mean than another domain's mean does. A feature's norm is 1, so
  a mean's own norm says how far its pictures are spread (Spearman 1904, correction for attenuation):
  s² = (n ‖μ‖² − 1) / (n − 1) estimates the squared norm of the mean over all pictures of the kind, and
  μ_a · μ_b / (s_a s_b) is what the cosine would be for clients of any size. For n to hold, an identity token is folded
  into its subspace once, not in each round that its client trains.
- `start=sibling`: a new subspace that only its pictures keep apart starts as a copy of the nearest whose text matches:
  the question is known, its pictures are new, and the softmax will mix the two. Another question starts afresh.

It uploads what DISCO does: one adapter of rank r a client-round, and a token, which with the picture is longer.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, Message, MetricRecord

from fedstrata.core import records
from fedstrata.core.adapters import Flat
from fedstrata.core.config import StrategyConfig, require
from fedstrata.core.identity import Token, cosines, pooled
from fedstrata.strategies.base import Parts, Setup
from fedstrata.strategies.disco import Disco, DiscoConfig
from fedstrata.strategies.facts import Facts
from fedstrata.strategies.organisation import Update, place

MATCHINGS, STARTS = ("corrected", "plain"), ("sibling", "nearest", "fresh")
STRANGERS = -2.0  # below every likeness: text or pictures do not match


@dataclass(frozen=True)
class StrataConfig(DiscoConfig):
    """Options of strata. `tau` is the text's threshold; null takes the text encoder's own."""

    name: str = "strata"
    token: str = "both"
    token_upload: str = "int8"  # so it is shorter than DISCO's, which is of text alone
    min_open: int = 10  # a mean over fewer pictures may fall below `picture_tau` of its own task
    picture_tau: float = 0.95  # cosine from which pictures are of one kind: halfway between those of pre-training tasks
    matching: str = "corrected"  # corrected | plain: the pictures' cosines free of the clients' sizes, or as they are
    start: str = "sibling"  # sibling | nearest, of all | fresh: where a new subspace begins

    def __post_init__(self) -> None:
        super().__post_init__()
        require(-1 <= self.picture_tau <= 1, "strategy.picture_tau", "a cosine between -1 and 1", self.picture_tau)
        require(self.matching in MATCHINGS, "strategy.matching", " | ".join(MATCHINGS), self.matching)
        require(self.start in STARTS, "strategy.start", " | ".join(STARTS), self.start)
        noisy = "plain with strategy.token_noise, which is in a token's norm"
        require(not self.token_noise or self.matching == "plain", "strategy.matching", noisy, self.matching)


class Strata(Disco):
    """DISCO with picture-aware tokens, matching free of client sizes, and subspaces that start warm."""

    facts: ClassVar[Facts] = Facts(grows=1, plain={"subspaces": 1}, neutral={"tau": -1, "picture_tau": -1})
    config_type: ClassVar[type[StrategyConfig]] = StrataConfig

    def __init__(self, options: Any, setup: Setup) -> None:
        super().__init__(options, setup)
        self.tau = setup.words_tau if options.tau is None else options.tau
        self._folded: dict[int, set[str]] = {}  # subspace → marks of the tokens in its own

    def _places(self, tokens: Sequence[Token]) -> list[int | None]:
        cache = [self._seen(subspace.token) for subspace in self.state.subspaces]
        known = np.stack(cache) if cache else self.state.tokens()
        seen = [Token(self._seen(token), token.count) for token in tokens]
        return place(seen, known, -1, self.options.min_open, self._likeness)

    def _seen(self, token: Token) -> npt.NDArray[np.float32]:
        """The token's value, its picture's part corrected or of norm 1, so that products are the cosines."""
        text, picture = np.split(token.value, [self.setup.words])
        count = token.count if self.options.matching == "corrected" else 1
        return np.concatenate([text, corrected(Token(picture, count))])

    def _likeness(self, rows: npt.ArrayLike, columns: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """The mean of text's and pictures' cosines where both match, else `STRANGERS`: [N, D], [K, D] → [N, K]."""
        split = self.setup.words
        x, y = np.asarray(rows, dtype=np.float64), np.asarray(columns, dtype=np.float64)
        text = self._texts(x, y)
        seen = np.clip(x[:, split:] @ y[:, split:].T, -1, 1) if split < x.shape[1] else np.ones_like(text)
        same = (text >= self.tau) & (seen >= self.options.picture_tau)
        return np.where(same, (text + seen) / 2, STRANGERS)

    def _texts(self, rows: npt.NDArray[Any], columns: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """The cosines of the texts: [N, D], [K, D] → [N, K]; a part that tokens lack tells nobody apart."""
        split = self.setup.words
        return cosines(rows[:, :split], columns[:, :split]) if split else np.ones((len(rows), len(columns)))

    def _start(self, subspace: int) -> Flat:
        known, start = self.state.subspaces, self.options.start
        if subspace < len(known) or not known or start == "fresh":
            return super()._start(subspace)
        group = [p.token for p in self.participants if p.token and self._placement.get(p.partition) == subspace]
        token, tokens = pooled(group).value[None], self.state.tokens()
        near = cosines(token, tokens)[0]
        if start == "sibling":
            near = np.where(self._texts(token, tokens)[0] >= self.tau, near, STRANGERS)
        nearest = int(near.argmax())
        return known[nearest].adapter if near[nearest] > STRANGERS else super()._start(subspace)

    def _updates(self, replies: Iterable[Message], trained: set[int]) -> Iterator[Update]:
        """As DISCO's; a client's token that its subspace holds already comes with count 0."""
        clients: list[int] = []

        def noted() -> Iterator[Message]:
            for message in replies:
                clients.append(records.binding(message).partition)
                yield message

        for update in super()._updates(noted(), trained):
            folded, mark = self._folded.setdefault(update.subspace, set()), _mark(clients[-1], update.token)
            yield replace(update, token=replace(update.token, count=0)) if mark in folded else update
            folded.add(mark)
            del update  # before the next one is loaded

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        result = super().aggregate_train(server_round, replies)
        self._folded = dict(enumerate(self._folded[index] for index in sorted(self._folded)))  # as `organise` numbers
        return result

    def save(self) -> Parts:
        parts = super().save()
        return replace(
            parts, facts={**parts.facts, "folded": [sorted(found) for _, found in sorted(self._folded.items())]}
        )

    def load(self, parts: Parts) -> None:
        super().load(parts)
        self._folded = {index: set(found) for index, found in enumerate(parts.facts["folded"])}


def corrected(token: Token) -> npt.NDArray[np.float32]:
    """μ / s: its product with another such vector is the cosine of the two means over all pictures of their kinds.

    s² = (n ‖μ‖² − 1) / (n − 1); at least ‖μ‖² / 4, since with few pictures the estimate may fall to 0 or below; ‖μ‖²
    for a single one, which says nothing of spread.
    """
    squared, n = float(token.value.astype(np.float64) @ token.value), token.count
    if not squared:
        return token.value
    spread = max((n * squared - 1) / (n - 1), squared / 4) if n > 1 else squared
    return np.asarray(token.value / np.sqrt(spread), dtype=np.float32)


def _mark(partition: int, token: Token) -> str:
    """What a client's token keeps as long as its data stays the same."""
    return f"{partition}:{blake2b(token.value.tobytes(), digest_size=8).hexdigest()}"
