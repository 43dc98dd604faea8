"""O-LoRA: every stage trains a subspace of its own, kept orthogonal to those before it, which are frozen and active.

Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning", Findings of EMNLP 2023, arXiv
2310.14152. Uses task identity: no.

The client minimises its loss + λ Σ |A_old A_newᵀ|, summed over layers and entries: rows of A span what a subspace
reads, so where they are orthogonal a new subspace is silent on what an old one answers to. A_old is the same on every
client, so the penalty is well defined, and a mean of adapters that are exactly orthogonal to it is so too. The frozen
subspaces travel to the participants, never back. Inference: all subspaces at weight 1, their ranks concatenated: it
grows by r a stage. A shared projector (the layout's tail) is no subspace: it goes on being trained and averaged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fedstrata.core.adapters import Flat
from fedstrata.core.config import StrategyConfig, require
from fedstrata.strategies.base import LocalHalf
from fedstrata.strategies.facts import Facts
from fedstrata.strategies.merging import MergeConfig
from fedstrata.strategies.staged import PAST, Staged, joined

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class OLoraConfig(MergeConfig):
    """Options of O-LoRA."""

    name: str = "olora"
    strength: float = 0.5  # λ, how firmly new subspaces are kept orthogonal; 0: they may overlap

    def __post_init__(self) -> None:
        super().__post_init__()
        good = 0 <= self.strength < float("inf")
        require(good, "strategy.strength", "a finite number of at least 0", self.strength)


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


class OLora(Staged):
    """A new LoRA every stage, orthogonal to the earlier ones, which are frozen; all of them answer."""

    facts: ClassVar[Facts] = Facts(
        "2310.14152", "EMNLP 2023", grows=1, plain={"subspaces": 1}, neutral={"strength": 0}, one_stage=True
    )
    config_type: ClassVar[type[StrategyConfig]] = OLoraConfig
    local_half: ClassVar[type[LocalHalf]] = Orthogonal

    def payload(self) -> Mapping[str, Flat]:
        return {PAST: self.state.past} if self.state.past.size else {}

    def beside(self, stage: int, round_: int) -> tuple[int, int]:
        return 0, self.setup.layout.lora.size(self.rank_after(stage - 1)) if stage > 1 else 0

    def rank_after(self, stage: int) -> int:
        return max(1, stage) * self.setup.rank

    def merged(self, adapters: Sequence[Flat]) -> Flat:
        return joined(self.setup.layout, *adapters)


def overlap(old: "Mapping[str, Tensor]", new: "Mapping[str, Tensor]") -> "Tensor":
    """Σ |A_old A_newᵀ| of each client, [C], over all layers in `old`: {layer.lora_A: [R, in]}; `new` has [C, r, in]."""
    terms = [(a @ new[name].mT).abs().sum((1, 2)) for name, a in old.items()]
    return sum(terms[1:], start=terms[0])
