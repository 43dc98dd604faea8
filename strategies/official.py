"""`strategy.compat=official`: DISCO as its published code behaves, for comparison only.

github.com/Ghy0501/FCIT, which departs from the paper (arXiv 2503.12897) in what is reproduced here in one process. Uses
task identity: no; but a client's place in the round stands in for it.

D7: a client's first optimiser step has learning rate 0, so that one with a single batch learns nothing and still counts
in the mean. D8: tokens are matched in the first round of a stage alone; behind it a client trains the subspace of
whoever held its place in that round. D10: from the second stage on all that is new trains the first free subspace in
that round; what is found to be a second new task loses its training. D11: a token that is revisited becomes
μ N + Σ n_k μ_k / (N + Σ n_k), whose norm grows by the factor N. Later rounds fold each token into the most similar one.

Not reproduced: D9. There, in the first round of a stage from the second on, every batch picks its subspace by the mean
feature of its own rows, so a client whose batches fall on both sides of τ spreads its epoch over several subspaces; one
of them is averaged, the others are overwritten by whichever client comes last. Here a client is sent one subspace and
uploads one: for batches to choose, every client would have to get and send the whole cache with moments of its own for
each part, the gate would have to let through adapters that nobody placed, and the bytes would be no run's of DISCO. Nor
are the empty subspaces in the softmax, where each weighs about e^(−cos/ε): 2e-9 beside a perfect match with CLIP's ε.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord

from fedstrata.core.adapters import Flat, fresh
from fedstrata.core.identity import Token, cosines, pooled
from fedstrata.strategies.base import LocalHalf, Participant, Parts, Setup, Strategy, passing
from fedstrata.strategies.disco import Disco
from fedstrata.strategies.organisation import DiscoState, place

if TYPE_CHECKING:
    from torch import Tensor


class FirstStepLost(LocalHalf):
    """D7: behind the first optimiser step the parameters are what they were."""

    def begin(self, ctx: Any) -> None:
        self.first = True

    def on_step(self, ctx: Any, parameters: Mapping[str, "Tensor"]) -> None:
        start = ctx.named(ctx.start) if self.first else {}
        for name, value in start.items():
            parameters[name].copy_(value)
        self.first = False


class Official(Disco):
    """DISCO with the defects D7, D8, D10 and D11 of its published code; for comparison only."""

    local_half: ClassVar[type[LocalHalf]] = FirstStepLost

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

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        before, first, answered = self.state, not self.places, set[int]()
        result = super().aggregate_train(
            server_round, passing(replies, lambda reply: answered.add(reply.binding.partition))
        )
        told = {p.partition: p.token for p in self.participants if p.partition in answered and p.token is not None}
        if first and answered:
            self.places = tuple(self._placement.get(p.partition, -1) for p in self.participants)
            self.state = self._lost(before, first_round(before, self.state, self._told(told)))
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
