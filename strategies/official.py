"""`strategy.compat=official`: DISCO as its published code behaves, for comparison only.

github.com/Ghy0501/FCIT, which departs from the paper (arXiv 2503.12897) in what is reproduced here in one process. Uses
task identity: no; but a client's place in the round stands in for it.

D7: a client's first optimiser step has learning rate 0, so that one with a single batch learns nothing and still counts
in the mean. D8: tokens are matched in the first round of a stage alone; behind it a client trains the subspace of
whoever held its place in that round. D9: in that round, from the second stage on, every batch trains the subspace whose
token is like the mean feature of its own rows (cosine above τ), else the first free one; a client's epoch may be spread
over several, of which the one of its cluster is averaged, and those of no cluster are overwritten by the last client's.
So clients get and send all subspaces in that round. D10: from the second stage on all that is new trains the first free
subspace in that round; what is found to be a second new task loses its training. D11: a token that is revisited becomes
μ N + Σ n_k μ_k / (N + Σ n_k), whose norm grows by the factor N. Later rounds fold each token into the most similar one.

A client's cluster is that of the mean over
its own features. Not reproduced are the empty subspaces in the softmax, where each weighs about e^(−cos/ε): 2e-9 beside
a perfect match with CLIP's ε.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord

from fedstrata.core.adapters import Flat, fresh
from fedstrata.core.identity import Token, cosines, pooled
from fedstrata.core.records import TrainReply
from fedstrata.strategies.base import LocalHalf, Participant, Parts, Setup, Strategy, passing
from fedstrata.strategies.disco import Disco
from fedstrata.strategies.organisation import DiscoState, place
from fedstrata.strategies.published import SLOTS, TAU, TOKENS, Published


class Official(Disco):
    """DISCO with the defects D7 to D11 of its published code; for comparison only."""

    local_half: ClassVar[type[LocalHalf]] = Published

    def __init__(self, options: Any, setup: Setup) -> None:
        super().__init__(options, setup)
        self.stage = 1
        self.places: tuple[int, ...] = ()  # place in the round → subspace, -1: none; () before the stage's first round

    def begin_stage(self, stage: int) -> None:
        """A resumed run announces a stage that has begun already."""
        if stage != self.stage:
            self.stage, self.places = stage, ()

    def meet(self, participants: Sequence[Participant]) -> None:
        Strategy.meet(self, participants)
        tokens = [participant.token for participant in participants]
        found = place([t for t in tokens if t is not None], self.state.tokens(), self.tau, 1)
        held = self.places or [-1 if j is None else j for j in found]
        self._placement = {p.partition: j for p, j in zip(participants, held, strict=False) if j >= 0}

    def _start(self, subspace: int) -> Flat:
        return super()._start(min(subspace, len(self.state.subspaces)))  # one draw for all that is new

    @property
    def choosing(self) -> bool:
        """Whether it is a later stage's first round, in which batches pick."""
        return bool(self.state.subspaces) and not self.places

    def payload(self) -> Mapping[str, Flat]:
        if not self.choosing:
            return {}
        slots = [self._start(subspace) for subspace in range(len(self.state.subspaces) + 1)]
        return {SLOTS: np.stack(slots), TOKENS: self.state.tokens(), TAU: np.array([self.tau], dtype=np.float32)}

    def extras(self) -> Mapping[str, tuple[int, ...]]:
        return {SLOTS: self.payload()[SLOTS].shape} if self.choosing else {}

    def beside(self, stage: int, round_: int) -> tuple[int, int]:
        """Of text tokens, where every stage so far has opened one subspace."""
        slots = stage * self.layout.size(self.setup.rank)
        return (slots, slots + (stage - 1) * self.setup.words + 1) if stage > 1 and round_ == 1 else (0, 0)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        before, first, answered = self.state, not self.places, set[int]()
        order, last = [p.partition for p in self.participants], dict[int, Flat]()  # the last place's subspaces

        def hear(reply: TrainReply) -> None:
            answered.add(reply.binding.partition)
            place = order.index(reply.binding.partition)
            if SLOTS in reply.extra and place > max(last, default=-1):
                last.clear()
                last[place] = reply.extra[SLOTS]

        result = super().aggregate_train(server_round, passing(replies, hear))
        told = {p.partition: p.token for p in self.participants if p.partition in answered and p.token is not None}
        if first and answered:
            self.places = tuple(self._placement.get(p.partition, -1) for p in self.participants)
            owned = {self._placement[partition] for partition in answered}
            stray = {j: adapter for slots in last.values() for j, adapter in enumerate(slots[:-1]) if j not in owned}
            after = first_round(before, overwritten(self.state, stray), self._told(told))
            self.state = self._lost(before, after)
        elif answered:
            self.state = later_round(before, self.state, list(told.values()))
        return result

    def _told(self, told: Mapping[int, Token]) -> dict[int, list[Token]]:
        """Subspace → the tokens of those who trained it."""
        groups: dict[int, list[Token]] = {}
        for partition, token in told.items():
            groups.setdefault(self._placement[partition], []).append(token)
        return groups

    def _lost(self, before: DiscoState, state: DiscoState) -> DiscoState:
        """D10: of several new subspaces all but the first start anew; not where everything was new."""
        known, setup = len(before.subspaces), self.setup
        kept = state.subspaces[: known + 1] if known else state.subspaces
        lost = [
            replace(subspace, adapter=fresh(self.layout, setup.rank, setup.seed, index, init=setup.init), moments=None)
            for index, subspace in enumerate(state.subspaces[len(kept) :], len(kept))
        ]
        return replace(state, subspaces=(*kept, *lost))

    def save(self) -> Parts:
        parts = super().save()
        return replace(parts, facts={**parts.facts, "stage": self.stage, "places": list(self.places)})

    def load(self, parts: Parts) -> None:
        super().load(parts)
        self.stage, self.places = int(parts.facts["stage"]), tuple(parts.facts["places"])


def overwritten(state: DiscoState, stray: Mapping[int, Flat]) -> DiscoState:
    """D9: the subspaces that no cluster owns are one client's."""
    subspaces = [
        replace(subspace, adapter=stray[j].copy()) if j in stray else subspace
        for j, subspace in enumerate(state.subspaces)
    ]
    return replace(state, subspaces=tuple(subspaces))


def first_round(before: DiscoState, after: DiscoState, told: Mapping[int, Sequence[Token]]) -> DiscoState:
    """D11 for the tokens of the subspaces that were there before. told: subspace → the tokens of who trained it."""
    subspaces = [
        replace(subspace, token=misplaced(before.subspaces[j].token, told[j]))
        if j < len(before.subspaces) and j in told
        else subspace
        for j, subspace in enumerate(after.subspaces)
    ]
    return replace(after, subspaces=tuple(subspaces))


def later_round(before: DiscoState, after: DiscoState, told: Sequence[Token]) -> DiscoState:
    """Each token is folded into the most similar one, whichever subspace its client trained."""
    tokens = [subspace.token for subspace in before.subspaces]
    for token in told:
        best = int(cosines(token.value[None], np.stack([one.value for one in tokens])).argmax())
        tokens[best] = pooled([tokens[best], token])
    subspaces = [replace(subspace, token=token) for subspace, token in zip(after.subspaces, tokens, strict=True)]
    return replace(after, subspaces=tuple(subspaces))


def misplaced(old: Token, new: Sequence[Token]) -> Token:
    """μ N + Σ n_k μ_k / (N + Σ n_k), where the mean is (μ N + Σ n_k μ_k) / (N + Σ n_k)."""
    total = old.count + sum(token.count for token in new)
    moved = sum((token.value.astype(np.float64) * token.count for token in new), np.zeros(old.value.shape))
    return Token((old.value.astype(np.float64) * old.count + moved / total).astype(np.float32), total)
