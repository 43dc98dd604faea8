"""DISCO by hand: tokens are vectors in the plane, so every cosine can be read off an angle."""

import math
from typing import Any

import numpy as np
import pytest

from fedstrata.core.adapters import fresh
from fedstrata.core.identity import Token, cosine
from fedstrata.strategies.activation import activate
from fedstrata.strategies.base import Inputs, Participant, Parts, Setup
from fedstrata.strategies.disco import Disco, DiscoConfig
from fedstrata.strategies.organisation import DiscoState, Subspace, Update, group, match, organise, place

EMPTY = np.zeros((0, 0), dtype=np.float32)
TAU = 0.9  # about 25.8 degrees


def at(degrees: float, norm: float = 1.0) -> np.ndarray:
    turn = math.radians(degrees)
    return np.array([norm * math.cos(turn), norm * math.sin(turn)], dtype=np.float32)


def stack(*degrees: float) -> np.ndarray:
    return np.stack([at(angle) for angle in degrees])


def token(degrees: float, count: int = 10) -> Token:
    return Token(at(degrees), count)


def flat(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def client(partition: int, degrees: float, count: int = 10) -> Participant:
    return Participant(partition + 2, partition, token(degrees, count))


def disco(setup: Setup, **options: Any) -> Disco:
    return Disco(DiscoConfig(**options), setup)


# match: the subspace with the largest cosine, if that reaches τ


def test_match_takes_the_nearest_subspace() -> None:
    cache = stack(0, 90, 180)
    assert match(at(80), cache, TAU) == 1
    assert match(at(175), cache, TAU) == 2


def test_match_of_a_token_that_is_near_to_none_is_none() -> None:
    assert match(at(45), stack(0, 90), TAU) is None


def test_match_ignores_the_norms() -> None:
    assert match(at(80, norm=1e-3), np.stack([at(0, 50), at(90, 0.01)]), TAU) == 1


def test_match_in_an_empty_cache_is_none() -> None:
    assert match(at(0), EMPTY, -1.0) is None


def test_match_reaches_tau_inclusively() -> None:
    # (3, 4)·(4, 3) / 25 = 24 / 25, with no rounding on the way
    cache = np.array([[4, 3]], dtype=np.float32)
    assert match([3, 4], cache, 24 / 25) == 0
    assert match([3, 4], cache, 24 / 25 + 1e-9) is None


def test_match_of_equally_near_subspaces_takes_the_oldest() -> None:
    assert match([1, 0], np.array([[4, 3], [4, -3], [0, 1]], dtype=np.float32), 0.5) == 0


def test_match_of_the_zero_token_is_none_above_tau_zero() -> None:
    assert match([0, 0], stack(0, 90), 0.1) is None


# group: single linkage among the new


def test_group_of_near_tokens_is_one_and_far_ones_stand_alone() -> None:
    assert group(stack(0, 90, 10, 95, 200), TAU) == [[0, 2], [1, 3], [4]]


def test_a_chain_of_near_tokens_is_one_group_though_its_ends_are_far() -> None:
    # a ~ b and b ~ c at 20 degrees (0.94 ≥ 0.9), a and c at 40 (0.77 < 0.9): single linkage
    assert group(stack(0, 20, 40), TAU) == [[0, 1, 2]]


def test_a_chain_is_one_group_in_whatever_order_its_members_come() -> None:
    assert group(stack(0, 40, 20), TAU) == [[0, 1, 2]]
    assert group(stack(20, 40, 0), TAU) == [[0, 1, 2]]
    assert group(stack(0, 60, 20, 40), TAU) == [[0, 1, 2, 3]]


def test_a_late_member_can_join_two_groups_into_one() -> None:
    assert group(stack(0, 40, 100, 20), TAU) == [[0, 1, 3], [2]]


def test_groups_come_in_the_order_of_their_first_members() -> None:
    assert group(stack(90, 0, 180, 91, 1), TAU) == [[0, 3], [1, 4], [2]]


def test_group_of_one_token() -> None:
    assert group(stack(30), TAU) == [[0]]


# place: old subspace, new subspace, or none


def test_place_opens_one_subspace_per_group_behind_the_old_ones() -> None:
    tokens = [token(90), token(1), token(180), token(92)]
    assert place(tokens, stack(0), TAU, min_open=1) == [1, 0, 2, 1]


def test_place_in_an_empty_cache_opens_from_zero() -> None:
    assert place([token(0), token(90), token(5)], EMPTY, TAU, min_open=1) == [0, 1, 0]


def test_place_of_nobody_is_empty() -> None:
    assert place([], stack(0), TAU, min_open=1) == []


def test_a_group_with_too_few_instructions_opens_nothing() -> None:
    assert place([token(90, 2)], stack(0), TAU, min_open=3) == [None]


def test_the_instructions_of_a_group_count_together() -> None:
    assert place([token(90, 1), token(92, 2)], stack(0), TAU, min_open=3) == [1, 1]


def test_a_group_that_opens_nothing_takes_no_number() -> None:
    assert place([token(90, 2), token(180, 10)], stack(0), TAU, min_open=3) == [None, 1]


def test_a_tiny_client_of_a_known_task_still_matches() -> None:
    assert place([token(5, 1)], stack(0), TAU, min_open=3) == [0]


def test_a_tiny_client_joins_the_subspace_that_a_large_one_of_its_task_opens() -> None:
    assert place([token(90, 1), token(95, 50)], stack(0), TAU, min_open=3) == [1, 1]


# organise: weighted means, running tokens


def test_organise_by_hand() -> None:
    old = DiscoState((Subspace(flat(9, 9), Token(flat(1, 0), 6)),))
    updates = [Update(0, flat(1, 2), Token(flat(0, 1), 1)), Update(0, flat(5, -2), Token(flat(1, 1), 3))]
    (subspace,) = organise(old, updates).subspaces
    assert subspace.adapter.tolist() == [4, -1]  # (1·1 + 3·5) / 4, (1·2 + 3·(−2)) / 4; the old one has no weight
    assert subspace.token.value.tolist() == pytest.approx([0.9, 0.4])  # (6·1 + 0 + 3) / 10, (0 + 1 + 3) / 10
    assert subspace.token.count == 10


def test_a_new_subspace_has_the_token_of_its_group() -> None:
    updates = [Update(0, flat(1), Token(flat(1, 0), 1)), Update(0, flat(3), Token(flat(0, 1), 1))]
    (subspace,) = organise(DiscoState(), updates).subspaces
    assert subspace.adapter.tolist() == [2]
    assert subspace.token.value.tolist() == [0.5, 0.5]
    assert subspace.token.count == 2


def test_subspaces_without_an_update_keep_their_bits() -> None:
    rng = np.random.default_rng(0)
    old = tuple(Subspace(rng.normal(size=9).astype(np.float32), token(angle)) for angle in (0, 90, 180))
    new = organise(DiscoState(old), [Update(1, rng.normal(size=9).astype(np.float32), token(91))]).subspaces
    assert [new[index] is old[index] for index in range(3)] == [True, False, True]


def test_organise_without_updates_is_the_same_state() -> None:
    old = DiscoState((Subspace(flat(1), token(0)),))
    assert organise(old, []) == old


def test_organise_appends_new_subspaces_without_a_gap() -> None:
    old = DiscoState((Subspace(flat(1), token(0)),))
    new = organise(old, [Update(3, flat(3), token(180)), Update(2, flat(2), token(90))])  # nobody filled 1
    assert [subspace.adapter.tolist() for subspace in new.subspaces] == [[1], [2], [3]]


def test_a_token_keeps_unit_order_norm_after_a_hundred_visits() -> None:
    state = organise(DiscoState(), [Update(0, flat(0), token(0))])
    for visit in range(100):
        state = organise(state, [Update(0, flat(visit), token(10 if visit % 2 else -10))])
    (subspace,) = state.subspaces
    assert subspace.token.count == 1010
    # the mean of unit vectors within ±10 degrees: (10·1 + 1000·cos 10°) / 1010 along the axis, nothing across
    assert subspace.token.value.tolist() == pytest.approx(
        [(10 + 1000 * math.cos(math.radians(10))) / 1010, 0], abs=1e-5
    )
    assert match(at(0), state.tokens(), TAU) == 0


# activate: weights per input


def test_softmax_over_one_subspace_is_weight_one_however_far_the_input() -> None:
    assert activate(stack(0, 90, 180), stack(0), 0.05).tolist() == [[1], [1], [1]]


def test_softmax_over_three_subspaces_by_hand() -> None:
    # cosines 1, 0, −1 at ε = 0.5: exp(2), 1, exp(−2) over their sum
    e2 = math.exp(2)
    total = e2 + 1 + 1 / e2
    found = activate(at(0)[None], stack(0, 90, 180), 0.5)
    assert found.tolist() == [pytest.approx([e2 / total, 1 / total, 1 / e2 / total], abs=1e-6)]
    assert found.dtype == np.float32


def test_softmax_does_not_see_subspaces_that_are_not_filled() -> None:
    one, three = activate(at(0)[None], stack(0), 0.5), activate(at(0)[None], stack(0, 90, 180), 0.5)
    assert one[0, 0] == 1  # a zero token beside it would have taken exp(0) of the weight
    assert three.sum() == pytest.approx(1)
    assert three[0, 0] < 0.9


def test_softmax_weights_do_not_depend_on_the_norms() -> None:
    plain = activate(stack(30), stack(0, 90), 0.1)
    scaled = activate(7 * stack(30), np.stack([at(0, 0.01), at(90, 100)]), 0.1)
    assert scaled == pytest.approx(plain, abs=1e-6)


def test_softmax_at_a_tiny_epsilon_does_not_overflow() -> None:
    assert activate(stack(10), stack(0, 90), 1e-6).tolist() == [[1, 0]]


def test_softmax_of_equally_near_subspaces_shares_equally() -> None:
    assert activate(np.array([[1, 0]], np.float32), np.array([[4, 3], [4, -3]], np.float32), 0.05).tolist() == [
        [0.5, 0.5]
    ]


def test_argmax_takes_the_best_alone_and_of_equals_the_oldest() -> None:
    cache = np.array([[0, 1], [4, 3], [4, -3]], dtype=np.float32)
    assert activate(np.array([[1, 0], [0, 5]], np.float32), cache, 0.05, "argmax").tolist() == [[0, 1, 0], [1, 0, 0]]


def test_the_activations_meet_in_their_limits() -> None:
    """A cold softmax is argmax, a hot one the mean of all, of which concat is K times as much."""
    inputs, tokens = stack(*range(0, 360, 37)), stack(0, 70, 150, 260)
    cold, hot = activate(inputs, tokens, 1e-4), activate(inputs, tokens, 1e6)
    assert np.allclose(cold, activate(inputs, tokens, 1.0, "argmax"), atol=1e-6)
    assert np.allclose(4 * hot, activate(inputs, tokens, 1.0, "concat"), atol=1e-5)
    assert np.allclose(activate(inputs, tokens, 0.05).sum(axis=1), 1, atol=1e-6)


def test_cosine_weights_are_the_cosines_themselves() -> None:
    found = activate(np.array([[3, 4]], np.float32), np.array([[4, 3], [-3, -4]], np.float32), 0.05, "cosine")
    assert found.tolist() == [pytest.approx([0.96, -1])]


def test_concat_weights_are_one() -> None:
    assert activate(stack(0, 50), stack(0, 90, 180), 0.05, "concat").tolist() == [[1, 1, 1], [1, 1, 1]]


# the strategy: whole rounds


def test_two_novel_tasks_in_one_round_open_two_subspaces_and_keep_their_first_training(
    setup: Setup, train_reply: Any, sent: Any
) -> None:
    strategy = disco(setup)
    strategy.meet([client(0, 0), client(1, 90), client(2, 2)])
    assert dict(strategy.placement()) == {0: 0, 1: 1, 2: 0}
    starts = sent(strategy)
    assert starts[0] == starts[2] == (0, fresh(setup.layout, 1, 0, 0).tolist())  # one A for the whole group
    assert starts[1] == (1, fresh(setup.layout, 1, 0, 1).tolist())
    strategy.aggregate_train(1, [train_reply(0, [1, 1, 1]), train_reply(1, [5, 6, 7]), train_reply(2, [3, 3, 3])])
    assert [adapter.tolist() for adapter in strategy.knowledge().adapters] == [[2, 2, 2], [5, 6, 7]]
    strategy.meet([client(1, 90), client(2, 2)])
    assert sent(strategy, 2) == {1: (1, [5, 6, 7]), 2: (0, [2, 2, 2])}


def test_a_client_that_returns_later_joins_its_old_subspace(setup: Setup, train_reply: Any, sent: Any) -> None:
    strategy = disco(setup)
    for number, degrees in enumerate((0, 90, 180), 1):
        strategy.meet([client(7, degrees)])
        strategy.aggregate_train(number, [train_reply(7, [degrees, 0, 0])])
    assert len(strategy.knowledge().adapters) == 3
    strategy.meet([client(7, 3)])
    assert sent(strategy, 4) == {7: (0, [0, 0, 0])}
    strategy.aggregate_train(4, [train_reply(7, [4, 4, 4])])
    assert [adapter.tolist()[0] for adapter in strategy.knowledge().adapters] == [4, 90, 180]


def test_only_the_placed_participants_are_sent_anything(setup: Setup, sent: Any) -> None:
    strategy = disco(setup)
    strategy.meet([client(0, 0), client(1, 90, count=2)])
    assert set(sent(strategy)) == {0}


def test_a_round_in_which_nobody_answers_changes_nothing(setup: Setup, sent: Any) -> None:
    strategy = disco(setup)
    strategy.meet([client(0, 0)])
    first = sent(strategy)
    strategy.aggregate_train(1, [])
    assert strategy.knowledge().adapters == ()
    strategy.meet([client(0, 0)])
    assert sent(strategy, 2) == first


def test_when_a_new_group_fails_as_a_whole_the_next_one_moves_up_and_placement_says_so(
    setup: Setup, train_reply: Any
) -> None:
    strategy = disco(setup)
    strategy.meet([client(0, 0), client(1, 90), client(2, 91)])
    assert dict(strategy.placement()) == {0: 0, 1: 1, 2: 1}
    strategy.aggregate_train(1, [train_reply(1, [1, 1, 1]), train_reply(2, [3, 3, 3])])  # client 0 was rejected
    assert len(strategy.knowledge().adapters) == 1
    assert dict(strategy.placement()) == {1: 0, 2: 0}
    strategy.meet([client(1, 90), client(0, 0)])
    assert dict(strategy.placement()) == {1: 0, 0: 1}


def test_a_reply_that_is_missing_leaves_the_mean_to_the_others(setup: Setup, train_reply: Any) -> None:
    strategy = disco(setup)
    strategy.meet([client(0, 0, 1), client(1, 4, 3), client(2, 2, 50)])
    strategy.aggregate_train(1, [train_reply(0, [1, 0, 0], 1), train_reply(1, [5, 0, 0], 3)])
    (adapter,) = strategy.knowledge().adapters
    assert adapter.tolist() == [4, 0, 0]
    assert strategy.state.subspaces[0].token.count == 4  # nor does the missing one's token enter


def test_tau_and_epsilon_are_the_encoders_unless_given(setup: Setup) -> None:
    assert (disco(setup).tau, disco(setup).epsilon) == (0.9, 0.05)
    given = disco(setup, tau=0.0, epsilon=0.5)
    assert (given.tau, given.epsilon) == (0.0, 0.5)
    given.meet([client(0, 0), client(1, 89), client(2, 91)])  # 91 is below 0 against 0, but near to 89
    assert set(given.placement().values()) == {0}


def test_the_state_survives_save_and_load(setup: Setup, train_reply: Any) -> None:
    strategy = disco(setup)
    strategy.meet([client(0, 0), client(1, 90)])
    strategy.aggregate_train(1, [train_reply(0, [1, 2, 3]), train_reply(1, [4, 5, 6], 7)])
    parts = strategy.save()
    assert sorted(parts.tensors) == ["subspace.0.adapter", "subspace.0.token", "subspace.1.adapter", "subspace.1.token"]
    again = disco(setup, tau=0.1, epsilon=9.0)
    again.load(Parts(dict(parts.tensors), dict(parts.facts)))
    assert (again.tau, again.epsilon) == (0.9, 0.05)
    for old, new in zip(strategy.state.subspaces, again.state.subspaces, strict=True):
        assert new.adapter.tobytes() == old.adapter.tobytes()
        assert new.token.value.tobytes() == old.token.value.tobytes()
        assert new.token.count == old.token.count


def test_an_empty_state_survives_save_and_load(setup: Setup) -> None:
    again = disco(setup)
    again.load(disco(setup).save())
    assert again.state == DiscoState()


def test_a_loaded_strategy_goes_on_as_the_saved_one_would(setup: Setup, train_reply: Any) -> None:
    first, second = disco(setup), disco(setup)
    first.meet([client(0, 0), client(1, 90)])
    first.aggregate_train(1, [train_reply(0, [1, 2, 3]), train_reply(1, [4, 5, 6])])
    second.load(first.save())
    for strategy in (first, second):
        strategy.meet([client(2, 5), client(3, 200)])
        strategy.aggregate_train(2, [train_reply(2, [7, 8, 9]), train_reply(3, [0, 1, 0])])
    one, two = first.save(), second.save()
    assert {name: tensor.tobytes() for name, tensor in one.tensors.items()} == {
        name: tensor.tobytes() for name, tensor in two.tensors.items()
    }
    assert one.facts == two.facts


def test_the_router_weighs_by_the_options_that_travel_with_the_knowledge(setup: Setup, train_reply: Any) -> None:
    strategy = disco(setup, activation="argmax")
    strategy.meet([client(0, 0), client(1, 90)])
    strategy.aggregate_train(1, [train_reply(0, [1, 2, 3]), train_reply(1, [4, 5, 6])])
    router = Disco.router(strategy.knowledge())
    assert router.needs_features
    assert router.weights(Inputs(stack(10, 80), [0, 0], ["a", "b"])).tolist() == [[1, 0], [0, 1]]


def test_the_router_of_an_empty_cache_weighs_nothing(setup: Setup) -> None:
    router = Disco.router(disco(setup).knowledge())
    assert router.weights(Inputs(None, [0, 0], ["a", "b"])).shape == (2, 0)


def test_a_token_of_a_revisited_subspace_stays_near_what_it_was(setup: Setup, train_reply: Any) -> None:
    strategy = disco(setup)
    for number in range(1, 101):
        strategy.meet([client(0, 0), client(1, 90)])
        strategy.aggregate_train(number, [train_reply(0, [1, 2, 3]), train_reply(1, [4, 5, 6])])
    tokens = strategy.knowledge().tokens
    assert len(tokens) == 2
    assert np.linalg.norm(tokens, axis=1).tolist() == pytest.approx([1, 1], abs=1e-4)
    assert cosine(tokens[0], tokens[1]) == pytest.approx(0, abs=1e-4)
