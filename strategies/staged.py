"""What methods share that train a LoRA of their own in every stage and keep those of earlier stages as they are.

They are told that a stage begins, not which task it brings. An adapter that nobody trained is not kept. A shared
projector (the layout's tail) belongs to no stage: it goes on being trained and averaged.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord

from fedstrata.core.adapters import Flat, Layout, fresh
from fedstrata.core.records import Knowledge
from fedstrata.strategies.base import Parts, Setup
from fedstrata.strategies.finetune import Finetune, FinetuneState
from fedstrata.strategies.optimizers import unpacked

PAST = "past"


@dataclass(frozen=True)
class StagedState(FinetuneState):
    """The adapter of the present stage, with the layout's tail; behind it the frozen ones.

    Attributes:
        adapter: the one that is trained now.
        stage: the stage that the adapter belongs to.
        trained: whether a round of the stage has come through; an adapter that nobody trained is not kept.
        past: the frozen ones as one adapter of concatenated ranks; empty without any.
    """

    stage: int = 1
    trained: bool = False
    past: Flat = field(default_factory=lambda: np.zeros(0, dtype=np.float32))


class Staged(Finetune):
    """A new LoRA every stage; a subclass says in `merged` what all of them answer."""

    state: StagedState

    def __init__(self, options: Any, setup: Setup) -> None:
        super().__init__(options, setup)
        self.state = StagedState(self.state.adapter)
        self._answer: tuple[StagedState, Flat] | None = None  # what the present state comes to: asked for all the time

    @abstractmethod
    def merged(self, adapters: Sequence[Flat]) -> Flat:
        """One adapter out of those of the stages that were trained, in their order, all without the tail."""

    @classmethod
    def mixes(cls, options: Any) -> bool:
        return True

    @property
    def adapter_rank(self) -> int:
        return self.setup.rank

    def begin_stage(self, stage: int) -> None:
        """A resumed run announces a stage that has begun already."""
        if stage != self.state.stage:
            setup = self.setup
            new = fresh(setup.layout, setup.rank, setup.seed, stage - 1, init=setup.init)
            self.state = opened(self.state, stage, new, setup.layout)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        before = self.state
        result = super().aggregate_train(server_round, replies)
        self.state = replace(self.state, trained=before.trained or self.state is not before)
        return result

    def knowledge(self) -> Knowledge:
        """While nothing has been trained, the present adapter, which changes nothing yet."""
        adapter, shared = self.setup.layout.cut(self.state.adapter)
        if self._answer is None or self._answer[0] is not self.state:
            kept = apart(self.setup.layout, self.state.past, self.setup.rank)
            self._answer = self.state, self.merged([*kept, adapter] if self.state.trained or not kept else kept)
        return Knowledge((self._answer[1],), shared=shared)

    def save(self) -> Parts:
        facts = {"stage": self.state.stage, "trained": self.state.trained}
        return Parts({**super().save().tensors, PAST: self.state.past}, facts)

    def load(self, parts: Parts) -> None:
        stage, trained = int(parts.facts["stage"]), bool(parts.facts["trained"])
        adapter, past, moments = parts.tensors["adapter"], parts.tensors[PAST], unpacked(parts.tensors)
        self.state = StagedState(adapter, stage, trained, past, moments=moments)


def opened(state: StagedState, stage: int, new: Flat, layout: Layout) -> StagedState:
    """A stage begins: what the one before it trained is frozen, and `new` takes its place with the tail going on."""
    adapter, tail = layout.cut(state.adapter)
    past = joined(layout, state.past, adapter) if state.trained else state.past
    return StagedState(np.concatenate([layout.cut(new)[0], tail]), stage, False, past)


def joined(layout: Layout, *flats: Flat) -> Flat:
    """Adapters without the tail as one of concatenated ranks: [B₁ B₂] [A₁; A₂] = B₁A₁ + B₂A₂; empty ones are none."""
    views = [layout.lora.split(flat) for flat in flats if flat.size]
    return layout.join({name: _stacked([view[name] for view in views]) for name, _, _ in layout.modules})


def apart(layout: Layout, flat: Flat, rank: int) -> list[Flat]:
    """The inverse of `joined` for adapters of one rank; none for an empty one."""
    if not flat.size:
        return []
    view, low = layout.lora.split(flat), layout.lora
    starts = range(0, low.rank(flat), rank)
    return [low.join({n: (a[s : s + rank], b[:, s : s + rank]) for n, (a, b) in view.items()}) for s in starts]


def _stacked(pairs: Sequence[tuple[Flat, Flat]]) -> tuple[Flat, Flat]:
    return np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs], axis=1)
