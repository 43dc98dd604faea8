"""strategy.projector=shared on a layout small enough for hand calculation: an adapter of three and a tail of two."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from fedstrata.core import records
from fedstrata.core.adapters import Layout, fresh
from fedstrata.core.config import StrategyConfig
from fedstrata.core.errors import BadInput
from fedstrata.core.identity import Token
from fedstrata.core.records import Knowledge
from fedstrata.strategies.base import Participant, Parts, Setup
from fedstrata.strategies.controls import Oracle, RandomRoute
from fedstrata.strategies.disco import Disco, DiscoConfig
from fedstrata.strategies.finetune import Finetune, FinetuneConfig

LAYOUT = Layout((("layer", 1, 2),), (("projector.weight", (2, 1)),))


@pytest.fixture
def shared(setup: Setup) -> Setup:
    return replace(setup, layout=LAYOUT)


def client(partition: int, degrees: float, count: int = 10, task: int = 0) -> Participant:
    value = np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], dtype=np.float32)
    return Participant(partition + 2, partition, Token(value, count), (task,))


def disco(setup: Setup, kind: type[Disco] = Disco) -> Disco:
    return kind(DiscoConfig(projector="shared"), setup)


def test_finetunes_mean_is_over_the_tail_too(shared: Setup, train_reply: Any, sent: Any) -> None:
    strategy = Finetune(FinetuneConfig(subspaces=1, projector="shared"), shared)
    strategy.meet([Participant(2, 0), Participant(3, 1)])
    assert sent(strategy)[0][1][3:] == [0, 0]
    strategy.aggregate_train(1, [train_reply(0, [1, 2, 0, 8, 0], 1), train_reply(1, [5, -2, 0, 0, 4], 3)])
    known = strategy.knowledge()
    assert known.adapters[0].tolist() == [4, -1, 0]
    assert known.shared.tolist() == [2, 3]
    again = Finetune(FinetuneConfig(subspaces=1, projector="shared"), shared)
    again.load(strategy.save())
    assert again.knowledge().shared.tolist() == [2, 3]


@pytest.mark.parametrize("kind", [Disco, RandomRoute, Oracle])
def test_subspaces_stay_apart_and_the_tail_is_everybodys_mean(
    shared: Setup, train_reply: Any, sent: Any, kind: type[Disco]
) -> None:
    strategy = disco(shared, kind)
    strategy.meet([client(0, 0, task=0), client(1, 90, 30, task=1)])
    starts = {partition: values for partition, (_, values) in sent(strategy).items()}
    assert starts == {j: [*fresh(LAYOUT.lora, 1, 0, j).tolist(), 0, 0] for j in (0, 1)}
    strategy.aggregate_train(1, [train_reply(0, [1, 2, 3, 4, 0], 10), train_reply(1, [7, 8, 9, 0, 8], 30)])
    known = strategy.knowledge()
    assert [adapter.tolist() for adapter in known.adapters] == [[1, 2, 3], [7, 8, 9]]
    assert known.shared.tolist() == [1, 6]  # (10·4 + 30·0) / 40, (10·0 + 30·8) / 40
    strategy.meet([client(0, 0, task=0)])
    assert sent(strategy, 2) == {0: (0, [1, 2, 3, 1, 6])}
    strategy.aggregate_train(2, [train_reply(0, [0, 0, 0, 5, 5], 10)])
    known = strategy.knowledge()
    assert [adapter.tolist() for adapter in known.adapters] == [[0, 0, 0], [7, 8, 9]]
    assert known.shared.tolist() == [5, 5]


def test_the_tail_survives_save_and_load_and_an_empty_round(shared: Setup, train_reply: Any) -> None:
    strategy = disco(shared)
    strategy.meet([client(0, 0)])
    strategy.aggregate_train(1, [train_reply(0, [1, 2, 3, 4, 5])])
    strategy.aggregate_train(2, [])
    again = disco(shared)
    parts = strategy.save()
    again.load(Parts(dict(parts.tensors), dict(parts.facts)))
    assert again.knowledge().shared.tolist() == [4, 5]
    assert again.knowledge().adapters[0].tolist() == [1, 2, 3]


def test_a_frozen_run_saves_and_sends_no_tail(setup: Setup, train_reply: Any) -> None:
    strategy = Disco(DiscoConfig(), setup)
    strategy.meet([client(0, 0)])
    strategy.aggregate_train(1, [train_reply(0, [1, 2, 3])])
    assert sorted(strategy.save().tensors) == ["subspace.0.adapter", "subspace.0.token"]
    assert sorted(records.knowledge_content(strategy.knowledge())) == ["arrays", "config", "router"]


def test_the_tail_travels_once_with_the_knowledge() -> None:
    adapters = tuple(np.full(3, value, dtype=np.float32) for value in (1, 2))
    known = Knowledge(adapters, shared=np.array([4, 5], dtype=np.float32))
    message = Message(records.knowledge_content(known), 2, records.EVALUATE)
    again = records.read_knowledge(message)
    assert again.shared.tolist() == [4, 5]
    assert [adapter.tolist() for adapter in again.adapters] == [[1, 1, 1], [2, 2, 2]]
    assert records.tensor_bytes([message]) == 4 * (2 * 3 + 2)
    frozen = Message(records.knowledge_content(Knowledge(adapters)), 2, records.EVALUATE)
    assert records.read_knowledge(frozen).shared.size == 0
    assert isinstance(message.content, RecordDict)


def test_every_subspace_may_have_a_tail_of_its_own(shared: Setup, train_reply: Any, sent: Any) -> None:
    strategy = Disco(DiscoConfig(projector="per-subspace"), shared)
    strategy.meet([client(0, 0), client(1, 90), client(2, 2, 30)])
    starts = {partition: values for partition, (_, values) in sent(strategy).items()}
    assert starts[1] == [*fresh(LAYOUT.lora, 1, 0, 1).tolist(), 0, 0]
    rows = {0: [1, 2, 3, 4, 0], 1: [7, 8, 9, 0, 8], 2: [5, 2, 3, 0, 4]}
    strategy.aggregate_train(1, [train_reply(k, row, 30 if k == 2 else 10) for k, row in rows.items()])
    known = strategy.knowledge()
    assert [adapter.tolist() for adapter in known.adapters] == [[4, 2, 3], [7, 8, 9]]
    assert known.shared.tolist() == [1, 3, 0, 8]  # (10·4 + 30·0) / 40, (10·0 + 30·4) / 40; the other's own
    assert [flat.tolist() for flat in known.whole(2)] == [[4, 2, 3, 1, 3], [7, 8, 9, 0, 8]]
    again = Disco(DiscoConfig(projector="per-subspace"), shared)
    again.load(strategy.save())
    again.meet([client(5, 90)])
    assert sent(again, 2) == {5: (1, [7, 8, 9, 0, 8])}


def test_a_shared_tail_is_behind_every_adapter() -> None:
    known = Knowledge((np.ones(3, np.float32), np.zeros(3, np.float32)), shared=np.array([4, 5], dtype=np.float32))
    assert [flat.tolist() for flat in known.whole(2)] == [[1, 1, 1, 4, 5], [0, 0, 0, 4, 5]]
    assert [flat.tolist() for flat in replace(known, shared=known.shared[:0]).whole(0)] == [[1, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize("kind", [StrategyConfig, DiscoConfig, FinetuneConfig])
def test_every_method_refuses_another_word(kind: type[StrategyConfig]) -> None:
    with pytest.raises(BadInput, match="strategy.projector: must be frozen or shared.*, got 'local'"):
        kind(projector="local")


def test_one_adapter_has_no_projectors_per_subspace() -> None:
    with pytest.raises(BadInput, match="strategy.projector: must be frozen or shared, got 'per-subspace'"):
        FinetuneConfig(projector="per-subspace")
