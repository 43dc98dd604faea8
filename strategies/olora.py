"""O-LoRA: every stage trains a subspace of its own, kept orthogonal to those before it, which are frozen and active.

Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning", Findings of EMNLP 2023, arXiv
2310.14152. Uses task identity: no.

The client minimises its loss + λ Σ |A_old A_newᵀ|, summed over layers and entries: rows of A span what a subspace
reads, so where they are orthogonal a new subspace is silent on what an old one answers to. A_old is the same on every
client, so the penalty is well defined, and a mean of adapters that are exactly orthogonal to it is so too. The frozen
subspaces travel to the participants, never back. Inference: all subspaces at weight 1, their ranks concatenated: it
grows by r a stage. A shared projector (the layout's tail) is no subspace: it goes on being trained and averaged.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord

from fedstrata.core.adapters import Flat, Layout, fresh
from fedstrata.core.config import StrategyConfig, require
from fedstrata.core.records import Knowledge
from fedstrata.strategies.base import LocalHalf, Parts, Setup
from fedstrata.strategies.facts import Facts
from fedstrata.strategies.finetune import Finetune, FinetuneState
from fedstrata.strategies.merging import MergeConfig
from fedstrata.strategies.optimizers import unpacked

if TYPE_CHECKING:
    from torch import Tensor

PAST = "past"


@dataclass(frozen=True)
class OLoraConfig(MergeConfig):
    """Options of O-LoRA."""

    name: str = "olora"
    strength: float = 0.5  # λ, how firmly new subspaces are kept orthogonal; 0: they may overlap

    def __post_init__(self) -> None:
        super().__post_init__()
        good = 0 <= self.strength < float("inf")
        require(good, "strategy.strength", "a finite number of at least 0", self.strength)


@dataclass(frozen=True)
class OLoraState(FinetuneState):
    """The subspace of the present stage, with the layout's tail; behind it the frozen ones.

    Attributes:
        adapter: the one that is trained now.
        stage: the stage that the adapter belongs to.
        trained: whether a round of the stage has come through; a subspace that nobody trained is not kept.
        past: the frozen subspaces as one adapter of concatenated ranks; empty without any.
    """

    stage: int = 1
    trained: bool = False
    past: Flat = field(default_factory=lambda: np.zeros(0, dtype=np.float32))


class Orthogonal(LocalHalf):
    """Trains the new subspace on top of the frozen ones."""

    def begin(self, ctx: Any) -> None:
        self.old: dict[str, Tensor] = {}
        if PAST in ctx.jobs[0].payload:
            frozen = ctx.underneath(ctx.jobs[0].payload[PAST])
            self.old = {name: factor for name, factor in frozen.items() if name.endswith("lora_A")}

    def loss(self, ctx: Any, batch: Any, out: Any, base_loss: "Tensor") -> "Tensor":
        if not self.old:
            return base_loss
        penalty: Tensor = batch.part * self.options.strength * overlap(self.old, ctx.named(ctx.values()))
        return base_loss + penalty


class OLora(Finetune):
    """A new LoRA every stage, orthogonal to the earlier ones, which are frozen; all of them answer."""

    facts: ClassVar[Facts] = Facts(
        "2310.14152", "EMNLP 2023", grows=1, plain={"subspaces": 1}, neutral={"strength": 0}, one_stage=True
    )
    config_type: ClassVar[type[StrategyConfig]] = OLoraConfig
    local_half: ClassVar[type[LocalHalf]] = Orthogonal

    state: OLoraState

    def __init__(self, options: Any, setup: Setup) -> None:
        super().__init__(options, setup)
        self.state = OLoraState(self.state.adapter)

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

    def payload(self) -> Mapping[str, Flat]:
        return {PAST: self.state.past} if self.state.past.size else {}

    def beside(self, stage: int, round_: int) -> tuple[int, int]:
        return 0, self.setup.layout.lora.size(self.rank_after(stage - 1)) if stage > 1 else 0

    def rank_after(self, stage: int) -> int:
        return max(1, stage) * self.setup.rank

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        before = self.state
        result = super().aggregate_train(server_round, replies)
        self.state = replace(self.state, trained=before.trained or self.state is not before)
        return result

    def knowledge(self) -> Knowledge:
        adapter, shared = self.setup.layout.cut(self.state.adapter)
        return Knowledge((joined(self.setup.layout, self.state.past, adapter),), shared=shared)

    def save(self) -> Parts:
        facts = {"stage": self.state.stage, "trained": self.state.trained}
        return Parts({**super().save().tensors, PAST: self.state.past}, facts)

    def load(self, parts: Parts) -> None:
        stage, trained = int(parts.facts["stage"]), bool(parts.facts["trained"])
        adapter, past, moments = parts.tensors["adapter"], parts.tensors[PAST], unpacked(parts.tensors)
        self.state = OLoraState(adapter, stage, trained, past, moments=moments)


def overlap(old: "Mapping[str, Tensor]", new: "Mapping[str, Tensor]") -> "Tensor":
    """Σ |A_old A_newᵀ| of each client, [C], over all layers in `old`: {layer.lora_A: [R, in]}; `new` has [C, r, in]."""
    terms = [(a @ new[name].mT).abs().sum((1, 2)) for name, a in old.items()]
    return sum(terms[1:], start=terms[0])


def opened(state: OLoraState, stage: int, new: Flat, layout: Layout) -> OLoraState:
    """A stage begins: what the one before it trained is frozen, and `new` takes its place with the tail going on."""
    adapter, tail = layout.cut(state.adapter)
    past = joined(layout, state.past, adapter) if state.trained else state.past
    return OLoraState(np.concatenate([layout.cut(new)[0], tail]), stage, False, past)


def joined(layout: Layout, *flats: Flat) -> Flat:
    """Adapters without the tail as one of concatenated ranks: [B₁ B₂] [A₁; A₂] = B₁A₁ + B₂A₂; empty ones are none."""
    views = [layout.lora.split(flat) for flat in flats if flat.size]
    return layout.join({name: _stacked([view[name] for view in views]) for name, _, _ in layout.modules})


def _stacked(pairs: Sequence[tuple[Flat, Flat]]) -> tuple[Flat, Flat]:
    return np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs], axis=1)
