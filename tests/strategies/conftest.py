"""A federation small enough for hand calculation: one layer, rank 1, three parameters an adapter."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedstrata.core import records
from fedstrata.core.adapters import Layout
from fedstrata.core.records import Binding, TrainReply
from fedstrata.server.flower_private import become_server
from fedstrata.strategies.base import Setup, Strategy

MakeReply = Callable[..., Message]
LAYOUT = Layout((("layer", 1, 2),))


@pytest.fixture(autouse=True)
def _server() -> None:
    become_server()


@pytest.fixture
def setup() -> Setup:
    """K = 3 tasks, τ = 0.9, ε = 0.05."""
    return Setup(seed=0, layout=LAYOUT, rank=1, subspaces=3, tau=0.9, epsilon=0.05)


@pytest.fixture
def train_reply() -> MakeReply:
    """A client's train reply; its node is its partition + 2."""

    def make(partition: int, values: Sequence[float], count: int = 10, loss: float = 1.0) -> Message:
        request = Message(RecordDict(), partition + 2, records.TRAIN)
        flat = np.array(values, dtype=np.float32)
        return records.train_reply(TrainReply(Binding("", 1, 1, partition), flat, count, loss, 3, 0.1), request)

    return make


@pytest.fixture
def sent() -> Callable[[Strategy], dict[int, tuple[int, list[float]]]]:
    """What a strategy sends in a round: partition → (subspace, adapter)."""

    def configure(strategy: Strategy, number: int = 1) -> dict[int, tuple[int, list[float]]]:
        messages = strategy.configure_train(number, ArrayRecord(), ConfigRecord(), None)  # type: ignore[arg-type]
        return {
            message.metadata.dst_node_id - 2: (
                int(message.content.config_records["config"]["subspace"]),  # type: ignore[arg-type]
                message.content.array_records["arrays"]["flat"].numpy().tolist(),
            )
            for message in messages
        }

    return configure
