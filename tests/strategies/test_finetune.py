"""finetune and joint: one adapter, one mean."""

from typing import Any

import numpy as np
import pytest

from fedstrata.core.adapters import fresh
from fedstrata.core.errors import BadInput
from fedstrata.strategies.base import Inputs, Participant, Parts, Setup
from fedstrata.strategies.finetune import Finetune, FinetuneConfig, Joint

TWO = [Participant(2, 0), Participant(3, 1)]


def test_the_adapter_has_the_rank_of_all_subspaces_together(setup: Setup) -> None:
    strategy = Finetune(FinetuneConfig(), setup)
    assert strategy.adapter_rank == 3  # K · r = 3 · 1
    assert strategy.state.adapter.size == setup.layout.size(3)
    assert Finetune(FinetuneConfig(subspaces=5), setup).adapter_rank == 5


def test_the_first_adapter_is_drawn_from_the_seed(setup: Setup) -> None:
    strategy = Finetune(FinetuneConfig(), setup)
    assert strategy.state.adapter.tobytes() == fresh(setup.layout, 3, 0, 0).tobytes()


def test_every_participant_gets_the_one_adapter_and_the_mean_becomes_the_next(
    setup: Setup, train_reply: Any, sent: Any
) -> None:
    strategy = Finetune(FinetuneConfig(subspaces=1), setup)
    strategy.meet(TWO)
    start = strategy.state.adapter.tolist()
    assert sent(strategy) == {0: (0, start), 1: (0, start)}
    strategy.aggregate_train(1, [train_reply(0, [1, 2, 0], 1), train_reply(1, [5, -2, 0], 3)])
    assert strategy.state.adapter.tolist() == [4, -1, 0]  # (1·1 + 3·5) / 4, (1·2 + 3·(−2)) / 4
    assert sent(strategy, 2) == {0: (0, [4, -1, 0]), 1: (0, [4, -1, 0])}


def test_a_round_without_replies_keeps_the_adapter(setup: Setup) -> None:
    strategy = Finetune(FinetuneConfig(), setup)
    before = strategy.state.adapter
    assert strategy.aggregate_train(1, []) == (None, None)
    assert strategy.state.adapter is before


def test_the_state_survives_save_and_load(setup: Setup, train_reply: Any) -> None:
    strategy = Finetune(FinetuneConfig(subspaces=1), setup)
    strategy.meet(TWO)
    strategy.aggregate_train(1, [train_reply(0, [1, 2, 3])])
    parts = strategy.save()
    again = Finetune(FinetuneConfig(subspaces=1), setup)
    again.load(Parts(dict(parts.tensors), dict(parts.facts)))
    assert again.knowledge().adapters[0].tolist() == [1, 2, 3]


def test_one_adapter_answers_everything_at_weight_one(setup: Setup) -> None:
    knowledge = Finetune(FinetuneConfig(), setup).knowledge()
    router = Finetune.router(knowledge)
    assert len(knowledge.adapters) == 1
    assert not router.needs_features
    assert router.weights(Inputs(None, [4, 5, 6], ["a", "b", "c"])).tolist() == [[1], [1], [1]]


def test_it_is_told_no_task_and_asks_for_no_token(setup: Setup) -> None:
    assert not Finetune.uses_task_identity
    assert not Finetune.needs_tokens
    assert not Finetune.pooled


def test_joint_is_finetune_on_pooled_data(setup: Setup, train_reply: Any) -> None:
    assert Joint.pooled
    joint, plain = (kind(FinetuneConfig(), setup) for kind in (Joint, Finetune))
    assert joint.state.adapter.tobytes() == plain.state.adapter.tobytes()
    replies = [train_reply(0, np.arange(9), 2), train_reply(1, np.ones(9), 5)]
    joint.aggregate_train(1, replies)
    plain.aggregate_train(1, replies)
    assert joint.state.adapter.tobytes() == plain.state.adapter.tobytes()


def test_no_subspaces_is_refused() -> None:
    with pytest.raises(BadInput, match=r"strategy.subspaces: must be at least 1, got 0"):
        FinetuneConfig(subspaces=0)
