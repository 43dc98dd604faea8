"""Stock Flower strategies under the federation loop."""

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message

from fedstrata.core.errors import BadInput
from fedstrata.server.grids import InProcessGrid
from fedstrata.server.passing import ParticipantsGrid
from fedstrata.strategies import find
from fedstrata.strategies.base import Participant, Setup
from fedstrata.strategies.finetune import Finetune, FinetuneConfig
from fedstrata.strategies.flower import Stock, StockConfig

AVERAGE, MEDIAN = "flwr.serverapp.strategy:FedAvg", "flwr.serverapp.strategy:FedMedian"


def stock(setup: Setup, name: str = AVERAGE, **arguments: Any) -> Stock:
    kind = find(name)
    assert issubclass(kind, Stock)
    return kind(StockConfig(name=name, subspaces=1, arguments=arguments or None), setup)


def configure(strategy: Stock, partitions: Iterable[int], number: int = 1) -> list[Message]:
    """As the federation does it: the grid has eight clients, the strategy sees the round's."""
    grid = InProcessGrid(8, 1, "builtins:object")  # the grid is asked for its nodes only
    participants = [Participant(grid.roster[partition], partition) for partition in partitions]
    strategy.meet(participants)
    view = ParticipantsGrid(grid, [participant.node for participant in participants])
    return list(strategy.configure_train(number, ArrayRecord(), ConfigRecord(), view))


@pytest.mark.parametrize("name", [AVERAGE, MEDIAN])
def test_only_the_rounds_participants_are_trained_in_their_order(setup: Setup, name: str) -> None:
    messages = configure(stock(setup, name), [5, 1, 6])
    assert [message.metadata.dst_node_id - 2 for message in messages] == [5, 1, 6]
    assert all(message.metadata.message_type == "train" for message in messages)


def test_the_message_carries_the_global_adapter_and_flowers_round(setup: Setup) -> None:
    strategy = stock(setup)
    (message,) = configure(strategy, [3], number=7)
    assert message.content.array_records["arrays"]["flat"].numpy().tolist() == strategy.state.adapter.tolist()
    assert message.content.config_records["config"]["server-round"] == 7


def test_a_round_with_one_participant_does_not_wait_for_a_second(setup: Setup) -> None:
    assert len(configure(stock(setup), [4])) == 1


def test_a_round_with_fewer_participants_than_asked_for_trains_nobody(setup: Setup) -> None:
    strategy = stock(setup, min_train_nodes=3)
    assert configure(strategy, [0, 1]) == []
    assert len(configure(strategy, [0, 1, 2])) == 3
    assert configure(stock(setup, min_available_nodes=3), [0, 1]) == []


def test_flowers_own_sampling_is_a_function_of_the_seed_and_the_round(setup: Setup) -> None:
    def drawn(number: int) -> list[int]:
        return [m.metadata.dst_node_id for m in configure(stock(setup, fraction_train=0.5), range(8), number)]

    first = drawn(1)
    assert len(first) == 4
    random.seed(99)
    assert drawn(1) == first
    assert any(drawn(number) != first for number in range(2, 8))


def test_flowers_sampling_leaves_pythons_generator_where_it_was(setup: Setup) -> None:
    random.seed(5)
    expected = random.Random(5).random()
    configure(stock(setup), [0, 1, 2])
    assert random.random() == expected


def test_fedavg_equals_finetunes_mean(setup: Setup, train_reply: Any) -> None:
    rng = np.random.default_rng(0)
    replies = [train_reply(p, rng.normal(size=3), int(rng.integers(1, 60)), float(rng.random())) for p in range(6)]
    plain, wrapped = Finetune(FinetuneConfig(subspaces=1), setup), stock(setup)
    assert wrapped.state.adapter.tobytes() == plain.state.adapter.tobytes()
    plain.aggregate_train(1, replies)
    wrapped.aggregate_train(1, replies)
    assert wrapped.state.adapter == pytest.approx(plain.state.adapter, abs=1e-6)
    assert wrapped.state.adapter.dtype == np.float32
    assert wrapped.knowledge().adapters[0] is wrapped.state.adapter


def test_fedmedian_takes_the_median_whatever_the_counts(setup: Setup, train_reply: Any) -> None:
    strategy = stock(setup, MEDIAN)
    replies = [train_reply(0, [1, 0, 5], 1), train_reply(1, [2, -1, 6], 1000), train_reply(2, [90, 4, 7], 3)]
    strategy.aggregate_train(1, replies)
    assert strategy.state.adapter.tolist() == [2, 0, 6]


def test_a_round_without_replies_keeps_the_adapter(setup: Setup) -> None:
    strategy = stock(setup)
    before = strategy.state.adapter
    strategy.aggregate_train(1, [])
    assert strategy.state.adapter is before


def test_the_classes_own_arguments_reach_it(setup: Setup) -> None:
    strategy = stock(setup, "flwr.serverapp.strategy:FedAvgM", server_learning_rate=0.5, server_momentum=0.25)
    assert vars(strategy.inner)["server_learning_rate"] == 0.5
    assert vars(strategy.inner)["server_momentum"] == 0.25


@pytest.mark.parametrize(("name", "arguments"), [(AVERAGE, {"speed": 3}), ("flwr.serverapp.strategy:Strategy", {})])
def test_arguments_that_the_class_refuses_are_bad_input(setup: Setup, name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"strategy\.arguments: \w+ refuses them"):
        stock(setup, name, **arguments)


def test_a_server_optimiser_goes_on_from_the_adapter_it_sent(setup: Setup, train_reply: Any) -> None:
    strategy = stock(setup, "flwr.serverapp.strategy:FedAdam", eta=0.5, beta_1=0.0, beta_2=0.0, tau=0.0)
    start = strategy.state.adapter.copy()
    configure(strategy, [0, 1])
    strategy.aggregate_train(1, [train_reply(0, start + 1), train_reply(1, start - [3, -3, -3])])
    # without moments Adam steps by eta in the sign of the mean change, which is (−1, +2, +2)
    assert strategy.state.adapter == pytest.approx(start + np.array([-0.5, 0.5, 0.5]), abs=1e-5)
