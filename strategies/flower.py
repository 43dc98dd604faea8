"""Any stock Flower strategy under the federation loop: `strategy.name=flwr.serverapp.strategy:FedMedian`.

It keeps one global adapter, as `finetune` does, and leaves the arithmetic to Flower's class. Uses task identity: no.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedstrata.core import records
from fedstrata.core.config import StrategyConfig
from fedstrata.core.errors import BadInput
from fedstrata.core.seeds import derive
from fedstrata.strategies.base import Setup
from fedstrata.strategies.finetune import Finetune, FinetuneConfig, FinetuneState

NEEDED = ("min_train_nodes", "min_available_nodes")  # constructor arguments of Flower's strategies


@dataclass(frozen=True)
class StockConfig(FinetuneConfig):
    """Options of a stock Flower strategy: its own constructor arguments go into `arguments`."""

    arguments: dict[str, Any] | None = None


class Stock(Finetune):
    """Hands `configure_train` and `aggregate_train` to a Flower strategy; subclasses name it in `flower_type`."""

    config_type: ClassVar[type[StrategyConfig]] = StockConfig
    flower_type: ClassVar[type[FlowerStrategy]]

    def __init__(self, options: StockConfig, setup: Setup) -> None:
        super().__init__(options, setup)
        try:
            self.inner = self.flower_type(**(options.arguments or {}))
        except (TypeError, ValueError) as error:
            raise BadInput(f"strategy.arguments: {self.flower_type.__name__} refuses them: {error}") from error
        for name in NEEDED:  # Flower asks for two nodes; a round of ours may have one participant
            if hasattr(self.inner, name) and name not in (options.arguments or {}):
                setattr(self.inner, name, 1)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """`grid` shows this round's participants only, so Flower's own sampling keeps the round's sample.

        Flower would wait for ever for more nodes than there are, so such a round trains nobody. It samples by Python's
        global generator, which is seeded for the call; messages go out in the order of the participants.
        """
        nodes = [participant.node for participant in self.participants]
        if max(getattr(self.inner, name, 1) for name in NEEDED) > len(nodes):
            return []
        before = random.getstate()
        random.seed(derive(self.setup.seed, "stock", server_round))
        try:
            arrays = records.arrays(flat=self.state.adapter)
            messages = list(self.inner.configure_train(server_round, arrays, config, grid))
        finally:
            random.setstate(before)
        return sorted(messages, key=lambda message: nodes.index(message.metadata.dst_node_id))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        arrays, metrics = self.inner.aggregate_train(server_round, replies)
        if arrays is not None:
            self.state = FinetuneState(arrays[records.FLAT].numpy().astype("float32"))
        return arrays, metrics


def wrap(flower_type: type[FlowerStrategy]) -> type[Stock]:
    """A `Strategy` class for a stock Flower class."""
    return type(flower_type.__name__, (Stock,), {"flower_type": flower_type, "__doc__": flower_type.__doc__})
