"""Sequential fine-tuning and joint training: the two ends between which every continual method lies.

`finetune`: one LoRA, FedAvg by sample count (McMahan et al. 2017, arXiv 1602.05629), stage after stage: what a
federation does that knows nothing of continual learning. `joint`: the same on all tasks pooled, T·R rounds: the upper
bound. Both have rank K·r, the size of DISCO's K subspaces. Uses task identity: no.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedstrata.core import records
from fedstrata.core.adapters import Flat, fresh
from fedstrata.core.config import StrategyConfig, require
from fedstrata.core.records import Knowledge
from fedstrata.strategies.base import Parts, Setup, Strategy, train_messages
from fedstrata.strategies.facts import Facts
from fedstrata.strategies.merging import MergeConfig, Merging, merge_options
from fedstrata.strategies.optimizers import Moments, packed, unpacked


@dataclass(frozen=True)
class FinetuneConfig(MergeConfig):
    """Options of finetune and joint."""

    name: str = "finetune"
    subspaces: int | None = None  # the adapter's rank is subspaces · lora.rank; null: one per task of the scenario

    def __post_init__(self) -> None:
        super().__post_init__()
        good = self.subspaces is None or self.subspaces >= 1
        require(good, "strategy.subspaces", "at least 1", self.subspaces)


@dataclass(frozen=True)
class FinetuneState:
    """The one global adapter, with the layout's tail where it has one, and its moments where it has an optimiser."""

    adapter: Flat
    moments: Moments | None = field(default=None, kw_only=True)


class Finetune(Strategy):
    """One global adapter, merged from the participants' of each round."""

    facts: ClassVar[Facts] = Facts("1602.05629", "AISTATS 2017")
    config_type: ClassVar[type[StrategyConfig]] = FinetuneConfig
    averages: ClassVar[bool] = True

    def __init__(self, options: FinetuneConfig, setup: Setup) -> None:
        super().__init__(options, setup)
        self.state = FinetuneState(fresh(setup.layout, self.adapter_rank, setup.seed, 0, init=setup.init))

    @property
    def adapter_rank(self) -> int:
        return int(self.options.subspaces or self.setup.subspaces) * self.setup.rank

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return train_messages(self.participants, {0: self.state.adapter}, self.placement(), config, self.payload())

    def payload(self) -> Mapping[str, Flat]:
        """What participants get beside the adapter; a method that inherits this one may send something."""
        return {}

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The merge becomes the state, in one pass; Flower's record of it would be a copy that nobody reads."""
        old = self.state
        merging = Merging(merge_options(self.options), lambda: old.adapter, old.moments, self.setup.layout)
        for message in replies:
            reply = records.read_train_reply(message)
            merging.add(reply.flat, reply.count)
            del message, reply  # before the next one is loaded
        if merging.weight:
            adapter, moments = merging.result()
            self.state = replace(old, adapter=adapter, moments=moments)
        return None, None

    def knowledge(self) -> Knowledge:
        adapter, shared = self.setup.layout.cut(self.state.adapter)
        return Knowledge((adapter,), shared=shared)

    def save(self) -> Parts:
        return Parts({"adapter": self.state.adapter, **packed(self.state.moments)})

    def load(self, parts: Parts) -> None:
        self.state = FinetuneState(parts.tensors["adapter"], moments=unpacked(parts.tensors))


class Joint(Finetune):
    """The upper bound: every participant draws an equal 1/T share of its pooled data of all T tasks."""

    facts: ClassVar[Facts] = Facts()
    pooled: ClassVar[bool] = True
