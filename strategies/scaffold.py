"""SCAFFOLD: control variates take out of every step what makes one client drift from the others.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020, arXiv 1910.06378.
Uses task identity: no.

The server sends its control c beside the adapter; client k remembers its own, c_k, and steps along g − c_k + c. Behind
its K steps c_k becomes the mean of the gradients g that it saw, and it uploads Δc_k. The paper writes that mean as
c_k − c + (x − y)/(Kη), which is the same for SGD and wrong for AdamW. The server adds |S|/N · mean Δc_k over the
round's |S| replies of N clients. Adapters are averaged by sample counts, as in `finetune`.

What a client remembers lives with the client: a reply that the server refuses has moved c_k and not c.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord

from fedstrata.core.adapters import Flat
from fedstrata.core.config import StrategyConfig, require
from fedstrata.core.streaming import RunningMean
from fedstrata.strategies.base import LocalHalf, Parts, Setup, passing
from fedstrata.strategies.facts import Facts
from fedstrata.strategies.finetune import Finetune, FinetuneConfig, FinetuneState
from fedstrata.strategies.optimizers import unpacked

if TYPE_CHECKING:
    from torch import Tensor

CONTROL = "control"


@dataclass(frozen=True)
class ScaffoldConfig(FinetuneConfig):
    """Options of SCAFFOLD."""

    in_factors: ClassVar[bool] = True  # control variates are gradients of the factors

    name: str = "scaffold"
    strength: float = 1.0  # how much of c − c_k is added to a gradient; 0 is finetune

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.strength <= 1, "strategy.strength", "between 0 and 1", self.strength)


@dataclass(frozen=True)
class ScaffoldState(FinetuneState):
    """The global adapter and the server's control c, of the adapter's length."""

    control: Flat


class Controlled(LocalHalf):
    """Steps along g − c_k + c; remembers the mean of g."""

    def begin(self, ctx: Any) -> None:
        self.own = ctx.recall(CONTROL)
        self.correction = self.options.strength * (ctx.sent(CONTROL) - self.own)
        self.total = self.own.new_zeros(self.own.shape)

    def on_gradients(self, ctx: Any, gradients: Mapping[str, "Tensor"]) -> None:
        seen = ctx.gradient
        self.total[: len(seen)] += seen
        seen += self.correction[: len(seen)]

    def end(self, ctx: Any) -> Mapping[str, "Tensor"]:
        new = self.total / self.total.new_tensor(ctx.steps)[:, None]
        ctx.remember(CONTROL, new)
        return {CONTROL: new - self.own}


class Scaffold(Finetune):
    """FedAvg on one LoRA whose clients correct their gradients by control variates."""

    # c is a mean over clients, whatever they hold
    facts: ClassVar[Facts] = Facts("1910.06378", "ICML 2020", plain={}, neutral={"strength": 0}, splits=False)
    config_type: ClassVar[type[StrategyConfig]] = ScaffoldConfig
    local_half: ClassVar[type[LocalHalf]] = Controlled
    state: ScaffoldState

    def __init__(self, options: ScaffoldConfig, setup: Setup) -> None:
        super().__init__(options, setup)
        self.state = ScaffoldState(self.state.adapter, np.zeros_like(self.state.adapter))

    def payload(self) -> Mapping[str, Flat]:
        return {CONTROL: self.state.control}

    def extras(self) -> Mapping[str, tuple[int, ...]]:
        return {CONTROL: self.state.control.shape}

    def beside(self, stage: int, round_: int) -> tuple[int, int]:
        return self.state.control.size, self.state.control.size

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        mean = RunningMean()
        passed = passing(replies, lambda reply: mean.add(reply.extra[CONTROL], 1))
        result = super().aggregate_train(server_round, passed)
        if mean.weight:
            control = controlled(self.state.control, mean.value(), mean.weight / self.setup.clients)
            self.state = replace(self.state, control=control)
        return result

    def save(self) -> Parts:
        return Parts({**super().save().tensors, CONTROL: self.state.control})

    def load(self, parts: Parts) -> None:
        adapter, control = parts.tensors["adapter"], parts.tensors[CONTROL]
        self.state = ScaffoldState(adapter, control, moments=unpacked(parts.tensors))


def controlled(control: Flat, mean: Flat, share: float) -> Flat:
    """c + |S|/N · mean Δc; `share`: of all clients, those that took part."""
    return control + np.float32(share) * mean
