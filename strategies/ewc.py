"""EWC, federated: what mattered to earlier stages is held in place, parameter by parameter.

Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017, arXiv 1612.00796; online over
stages by γ as in Schwarz et al., "Progress & Compress", ICML 2018, arXiv 1805.06370. Uses task identity: no.

The client minimises its loss + (λ/2) Σ_i F_i (θ_i − θ*_i)². In the last round of a stage every participant measures
F_i = E[g_i²] over its examples, at the parameters that it has just trained, and uploads it beside the adapter: one
more adapter's worth of bytes in that round alone. The server takes the mean weighted by sample counts, which is the sum
of g² over all their examples divided by their number (a mean of squares below 0 is none, and counts as 0), sets
F ← γF + that mean and θ* to the merged adapter. A stage whose last round is skipped is not consolidated.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedstrata.core.adapters import Flat
from fedstrata.core.config import StrategyConfig, require
from fedstrata.core.streaming import RunningMean
from fedstrata.strategies.base import LocalHalf, Parts, Setup, passing
from fedstrata.strategies.facts import Facts
from fedstrata.strategies.finetune import Finetune, FinetuneConfig, FinetuneState
from fedstrata.strategies.optimizers import unpacked

if TYPE_CHECKING:
    from torch import Tensor

IMPORTANCE, ANCHOR, MEASURE = "importance", "anchor", "measure"


@dataclass(frozen=True)
class EwcConfig(FinetuneConfig):
    """Options of EWC."""

    in_factors: ClassVar[bool] = True  # importances are those of the factors' parameters

    name: str = "ewc"
    strength: float = 1e3  # λ; 0 is finetune
    gamma: float = 1.0  # γ, what is left of the importances of earlier stages when a stage ends
    samples: int = 0  # examples of a client that importances are measured on; 0: all

    def __post_init__(self) -> None:
        super().__post_init__()
        good = 0 <= self.strength < float("inf")
        require(good, "strategy.strength", "a finite number of at least 0", self.strength)
        require(0 <= self.gamma <= 1, "strategy.gamma", "between 0 and 1", self.gamma)
        require(self.samples >= 0, "strategy.samples", "at least 0", self.samples)


def _none() -> Flat:
    return np.zeros(0, dtype=np.float32)


@dataclass(frozen=True)
class EwcState(FinetuneState):
    """The global adapter, the importances F and the parameters θ* that they hold; empty before a stage has ended."""

    importance: Flat = field(default_factory=_none)
    anchor: Flat = field(default_factory=_none)


class Anchored(LocalHalf):
    """Adds the quadratic penalty; measures importances when it is asked to."""

    def loss(self, ctx: Any, batch: Any, out: Any, base_loss: "Tensor") -> "Tensor":
        importance = ctx.sent(IMPORTANCE)
        if importance is None:
            return base_loss
        held = quadratic(ctx.values(), ctx.sent(ANCHOR), importance, self.options.strength)
        penalty: Tensor = batch.part * held
        return base_loss + penalty

    def end(self, ctx: Any) -> Mapping[str, "Tensor"]:
        return {IMPORTANCE: ctx.squares(self.options.samples)} if ctx.jobs[0].options.get(MEASURE) else {}


class Ewc(Finetune):
    """FedAvg on one LoRA that is held where earlier stages need it (elastic weight consolidation)."""

    facts: ClassVar[Facts] = Facts("1612.00796", "PNAS 2017", plain={}, neutral={"strength": 0})
    config_type: ClassVar[type[StrategyConfig]] = EwcConfig
    local_half: ClassVar[type[LocalHalf]] = Anchored
    state: EwcState

    def __init__(self, options: EwcConfig, setup: Setup) -> None:
        super().__init__(options, setup)
        self.state = EwcState(self.state.adapter)
        self.measuring = False  # whether the round under way is the last of its stage

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.measuring = server_round % self.setup.rounds == 0
        return super().configure_train(server_round, arrays, ConfigRecord({**config, MEASURE: self.measuring}), grid)

    def payload(self) -> Mapping[str, Flat]:
        held = {IMPORTANCE: self.state.importance, ANCHOR: self.state.anchor}
        return held if self.state.importance.size else {}

    def extras(self) -> Mapping[str, tuple[int, ...]]:
        return {IMPORTANCE: self.state.adapter.shape} if self.measuring else {}

    def beside(self, stage: int, round_: int) -> tuple[int, int]:
        size = self.state.adapter.size
        return size if round_ == self.setup.rounds else 0, 2 * size if stage > 1 else 0

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        if not self.measuring:
            return super().aggregate_train(server_round, replies)
        mean = RunningMean()
        passed = passing(replies, lambda reply: mean.add(np.maximum(reply.extra[IMPORTANCE], 0), reply.count))
        result = super().aggregate_train(server_round, passed)
        if mean.weight:
            self.state = consolidated(self.state, mean.value(), self.options.gamma)
        return result

    def save(self) -> Parts:
        held = {IMPORTANCE: self.state.importance, ANCHOR: self.state.anchor}
        return Parts({**super().save().tensors, **held})

    def load(self, parts: Parts) -> None:
        adapter, importance, anchor = (parts.tensors[name] for name in ("adapter", IMPORTANCE, ANCHOR))
        self.state = EwcState(adapter, importance, anchor, moments=unpacked(parts.tensors))


def quadratic(values: "Tensor", anchor: "Tensor", importance: "Tensor", strength: float) -> "Tensor":
    """(λ/2) Σ_i F_i (θ_i − θ*_i)² of each row: [C, size] → [C]."""
    return 0.5 * strength * (importance * (values - anchor).square()).sum(1)


def consolidated(state: EwcState, measured: Flat, gamma: float) -> EwcState:
    """F ← γF + what was measured, θ* ← the merged adapter."""
    kept = np.float32(gamma) * state.importance if state.importance.size else np.float32(0)
    return replace(state, importance=kept + measured, anchor=state.adapter)
