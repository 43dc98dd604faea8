"""oracle and random-route: what perfect and blind routing answer with."""

from typing import Any

import numpy as np

from fedstrata.core.identity import Token
from fedstrata.strategies.base import Inputs, Participant, Setup
from fedstrata.strategies.controls import Oracle, RandomRoute
from fedstrata.strategies.disco import DiscoConfig


def told(partition: int, *tasks: int) -> Participant:
    return Participant(partition + 2, partition, None, tasks)


def oracle(setup: Setup) -> Oracle:
    return Oracle(DiscoConfig(name="oracle"), setup)


def inputs(*tasks: int) -> Inputs:
    return Inputs(None, tasks, [str(row) for row in range(len(tasks))])


def test_oracle_says_that_it_uses_task_identity() -> None:
    assert Oracle.uses_task_identity
    assert not Oracle.needs_tokens
    assert not RandomRoute.uses_task_identity


def test_oracle_gives_every_task_one_subspace_in_the_order_they_came(setup: Setup, train_reply: Any, sent: Any) -> None:
    strategy = oracle(setup)
    strategy.meet([told(0, 5), told(1, 2), told(2, 5)])
    assert {partition: subspace for partition, (subspace, _) in sent(strategy).items()} == {0: 0, 1: 1, 2: 0}
    strategy.aggregate_train(1, [train_reply(0, [1, 1, 1]), train_reply(1, [9, 9, 9]), train_reply(2, [3, 3, 3])])
    assert [adapter.tolist() for adapter in strategy.knowledge().adapters] == [[2, 2, 2], [9, 9, 9]]
    assert strategy.knowledge().options["owners"] == [5, 2]


def test_oracle_routes_every_input_to_its_task_and_unknown_tasks_nowhere(setup: Setup, train_reply: Any) -> None:
    strategy = oracle(setup)
    strategy.meet([told(0, 5), told(1, 2)])
    strategy.aggregate_train(1, [train_reply(0, [1, 1, 1]), train_reply(1, [9, 9, 9])])
    router = Oracle.router(strategy.knowledge())
    assert not router.needs_features
    assert router.weights(inputs(2, 5, 7)).tolist() == [[0, 1], [1, 0], [0, 0]]


def test_oracle_routes_before_any_subspace_exists(setup: Setup) -> None:
    assert Oracle.router(oracle(setup).knowledge()).weights(inputs(0, 1)).shape == (2, 0)


def test_a_task_whose_first_round_failed_does_not_shift_the_owners_of_the_others(
    setup: Setup, train_reply: Any, sent: Any
) -> None:
    strategy = oracle(setup)
    strategy.meet([told(0, 5), told(1, 2), told(2, 8)])
    strategy.aggregate_train(1, [train_reply(1, [1, 1, 1]), train_reply(2, [8, 8, 8])])  # task 5's client failed
    assert strategy.knowledge().options["owners"] == [2, 8]
    assert dict(strategy.placement()) == {1: 0, 2: 1}
    strategy.meet([told(0, 5), told(2, 8)])
    assert sent(strategy, 2)[2] == (1, [8, 8, 8])
    strategy.aggregate_train(2, [train_reply(0, [5, 5, 5]), train_reply(2, [9, 9, 9])])
    assert strategy.knowledge().options["owners"] == [2, 8, 5]
    assert [adapter.tolist()[0] for adapter in strategy.knowledge().adapters] == [1, 9, 5]


def test_a_skipped_round_leaves_no_owner_behind(setup: Setup, train_reply: Any) -> None:
    strategy = oracle(setup)
    strategy.meet([told(0, 5)])  # skipped: nothing is aggregated
    assert strategy.save().facts["owners"] == []
    strategy.meet([told(1, 2)])
    assert dict(strategy.placement()) == {1: 0}  # as a run that was resumed here would number it
    strategy.aggregate_train(2, [train_reply(1, [1, 1, 1])])
    assert strategy.knowledge().options["owners"] == [2]


def test_oracles_state_survives_save_and_load(setup: Setup, train_reply: Any) -> None:
    strategy, again = oracle(setup), oracle(setup)
    strategy.meet([told(0, 5), told(1, 2)])
    strategy.aggregate_train(1, [train_reply(0, [1, 2, 3]), train_reply(1, [4, 5, 6])])
    again.load(strategy.save())
    again.meet([told(3, 2)])
    assert dict(again.placement()) == {3: 1}
    assert again.knowledge().options == strategy.knowledge().options
    assert again.knowledge().tokens.shape == (2, 0)


def test_random_route_trains_as_disco_does(setup: Setup, train_reply: Any) -> None:
    strategy = RandomRoute(DiscoConfig(name="random-route"), setup)
    right, up = Token(np.array([1, 0], np.float32), 10), Token(np.array([0, 1], np.float32), 10)
    strategy.meet([Participant(2, 0, right), Participant(3, 1, up)])
    strategy.aggregate_train(1, [train_reply(0, [1, 1, 1]), train_reply(1, [2, 2, 2])])
    assert [adapter.tolist()[0] for adapter in strategy.knowledge().adapters] == [1, 2]


def filled(setup: Setup, train_reply: Any) -> RandomRoute:
    strategy = RandomRoute(DiscoConfig(name="random-route"), setup)
    turns = [np.array(v, np.float32) for v in ([1, 0], [0, 1], [-1, 0])]
    strategy.meet([Participant(p + 2, p, Token(turn, 10)) for p, turn in enumerate(turns)])
    strategy.aggregate_train(1, [train_reply(p, [p, p, p]) for p in range(3)])
    return strategy


def test_random_route_gives_each_input_one_subspace_at_weight_one(setup: Setup, train_reply: Any) -> None:
    router = RandomRoute.router(filled(setup, train_reply).knowledge())
    assert not router.needs_features
    weights = router.weights(Inputs(None, [0] * 300, [str(row) for row in range(300)]))
    assert weights.shape == (300, 3)
    assert set(weights.ravel().tolist()) == {0.0, 1.0}
    assert weights.sum(axis=1).tolist() == [1.0] * 300
    assert all(60 <= count <= 140 for count in weights.sum(axis=0))  # 100 each, four standard deviations around it


def test_random_route_draws_from_seed_task_and_example_alone(setup: Setup, train_reply: Any) -> None:
    router = RandomRoute.router(filled(setup, train_reply).knowledge())
    ids = [str(row) for row in range(50)]
    whole = router.weights(Inputs(None, [1] * 50, ids))
    half = router.weights(Inputs(None, [1] * 25, ids[25:]))
    assert half.tolist() == whole[25:].tolist()  # not on the batch
    assert router.weights(Inputs(None, [2] * 50, ids)).tolist() != whole.tolist()


def test_random_route_answers_before_any_subspace_exists(setup: Setup) -> None:
    strategy = RandomRoute(DiscoConfig(name="random-route"), setup)
    assert RandomRoute.router(strategy.knowledge()).weights(inputs(0, 1)).shape == (2, 0)
