"""Any stock Flower strategy under the federation loop: `strategy.name=flwr.serverapp.strategy:FedMedian`.

It keeps one global adapter, as `finetune` does, and leaves the arithmetic to Flower's class. Uses task identity: no.
"""

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedstrata.core import records
from fedstrata.core.config import StrategyConfig, require
from fedstrata.core.errors import BadInput
from fedstrata.core.packing import owned
from fedstrata.core.seeds import derive
from fedstrata.strategies.base import Parts, Setup
from fedstrata.strategies.finetune import Finetune, FinetuneConfig, FinetuneState

AVERAGES = (FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi, FedProx)  # go on from the replies' mean alone
NEEDED = ("min_train_nodes", "min_available_nodes")  # constructor arguments of Flower's strategies


@dataclass(frozen=True)
class StockConfig(FinetuneConfig):
    """Options of a stock Flower strategy: its own constructor arguments go into `arguments`."""

    arguments: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.merge == "mean", "strategy.merge", "mean: a Flower strategy merges by itself", self.merge)
        good = self.server_optimizer == "none"
        require(good, "strategy.server_optimizer", "none: a Flower strategy has its own", self.server_optimizer)

    @property
    def averages(self) -> bool:
        return super().averages and (self.arguments or {}).get("weighted_by_key", records.COUNT) == records.COUNT


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
        """Flower's classes look at all replies together, so all of them are held."""
        arrays, metrics = self.inner.aggregate_train(server_round, [_owned(message) for message in replies])
        if arrays is not None:
            self.state = FinetuneState(arrays[records.FLAT].numpy().astype("float32"))
        return arrays, metrics

    def save_inner(self) -> Parts:
        """The numbers and arrays that Flower's class carries from round to round: moments, momentum, clipping norms."""
        tensors: dict[str, Any] = {}
        return Parts(tensors, {"attributes": _attributes(self.inner, "", tensors)})

    def load_inner(self, parts: Parts) -> None:
        """The inverse; attributes that cannot be saved (functions) stay as the constructor made them."""
        _restore(self.inner, parts.facts["attributes"], parts.tensors)


def _owned(message: Message) -> Message:
    """The same reply with bytes of its own, where they lie in a file."""
    for name, record in list(message.content.array_records.items()):
        message.content[name] = owned(record)
    return message


def _attributes(holder: Any, path: str, tensors: dict[str, Any]) -> list[list[Any]]:
    """[name, packed value] of every attribute that can be saved."""
    packed = [[name, _pack(value, f"{path}/{name}", tensors)] for name, value in vars(holder).items()]
    return [[name, value] for name, value in packed if value is not None]


def _pack(value: Any, path: str, tensors: dict[str, Any]) -> dict[str, Any] | None:
    """{kind: what JSON can hold}, arrays in `tensors` by their paths; None where something cannot be saved."""
    if isinstance(value, np.ndarray | np.generic):
        tensors[path] = np.asarray(value)
        return {"array": path}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if isinstance(value, FlowerStrategy):  # Flower's wrappers hold the strategy that they wrap
        return {"strategy": _attributes(value, path, tensors)}
    if isinstance(value, Array):
        return {"record": _pack(value.numpy(), path, tensors)}
    if isinstance(value, list | tuple):
        items = [_pack(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
        return None if None in items else {type(value).__name__: items}
    if isinstance(value, ArrayRecord | dict) and all(isinstance(key, str | int) for key in value):
        pairs = [[key, _pack(item, f"{path}/{key}", tensors)] for key, item in value.items()]
        kind = "arrays" if isinstance(value, ArrayRecord) else "dict"
        return None if None in [item for _, item in pairs] else {kind: pairs}
    return None


def _unpack(packed: Mapping[str, Any], tensors: Mapping[str, Any], old: Any = None) -> Any:
    """The inverse of `_pack`; `old`: what stands there now, for a strategy within a strategy."""
    ((kind, value),) = packed.items()
    if kind == "array":
        return tensors[value][()]  # a scalar stays one
    if kind == "value":
        return value
    if kind == "strategy":
        return _restore(old, value, tensors)
    if kind == "record":
        return Array(np.asarray(_unpack(value, tensors)))
    if kind in ("dict", "arrays"):
        found = {key: _unpack(item, tensors) for key, item in value}
        return ArrayRecord(found) if kind == "arrays" else found
    items = [_unpack(item, tensors) for item in value]
    return tuple(items) if kind == "tuple" else items


def _restore(holder: Any, attributes: Iterable[tuple[str, Any]], tensors: Mapping[str, Any]) -> Any:
    for name, packed in attributes:
        setattr(holder, name, _unpack(packed, tensors, getattr(holder, name, None)))
    return holder


def wrap(flower_type: type[FlowerStrategy]) -> type[Stock]:
    """A `Strategy` class for a stock Flower class."""
    given = {"flower_type": flower_type, "averages": flower_type in AVERAGES, "__doc__": flower_type.__doc__}
    return type(flower_type.__name__, (Stock,), given)
