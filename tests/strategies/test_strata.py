"""strata's three changes by hand, each with its other value DISCO, and what the first two are for end to end."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord

from fedstrata.core.adapters import fresh
from fedstrata.core.errors import BadInput
from fedstrata.core.identity import Token
from fedstrata.strategies.base import Participant, Setup
from fedstrata.strategies.disco import Disco
from fedstrata.strategies.organisation import Subspace
from fedstrata.strategies.strata import Strata, StrataConfig, corrected

SEEN = StrataConfig(token="image", picture_tau=0.9, min_open=3)  # pictures alone: examples below stay small


def token(*values: float, count: int = 10) -> Token:
    return Token(np.array(values, dtype=np.float32), count)


def meeting(strategy: Disco, *tokens: Token) -> dict[int, int]:
    strategy.meet([Participant(partition + 2, partition, each) for partition, each in enumerate(tokens)])
    return dict(strategy.placement())


def train(strategy: Strata, train_reply: Any, *tokens: Token) -> None:
    """A round in which partition i holds tokens[i] and all of them answer."""
    meeting(strategy, *tokens)
    list(strategy.configure_train(1, ArrayRecord(), ConfigRecord(), None))  # type: ignore[arg-type]
    strategy.aggregate_train(1, [train_reply(i, [1.0, 1.0, 1.0], each.count) for i, each in enumerate(tokens)])


def with_subspaces(strategy: Strata, *tokens: Token) -> Strata:
    """Subspace i holds the adapter [i, i, i]."""
    filled = tuple(Subspace(np.full(3, index, np.float32), each) for index, each in enumerate(tokens))
    strategy.state = replace(strategy.state, subspaces=filled)
    return strategy


# matching


def test_the_corrected_norm_is_that_of_the_mean_over_all_instructions() -> None:
    """Three instructions out of e₁ and e₂: over all eight draws s² is right on average, while ‖μ‖² is too large."""
    draws = [np.eye(2)[list(chosen)].mean(0) for chosen in itertools.product((0, 1), repeat=3)]
    squares = []
    for mean in draws:
        scaled = corrected(Token(mean.astype(np.float32), 3))
        squares.append(float(mean @ mean) / float(scaled @ scaled))  # s² = ‖μ‖² / ‖μ/s‖²
    assert np.mean(squares) == pytest.approx(0.5)  # ‖(½, ½)‖²
    assert np.mean([mean @ mean for mean in draws]) == pytest.approx(2 / 3)


def test_equal_instructions_need_no_correction_and_one_alone_has_none() -> None:
    assert corrected(token(0.6, 0.8, count=7)).tolist() == pytest.approx([0.6, 0.8])
    assert corrected(token(0.0, 2.0, count=1)).tolist() == [0.0, 1.0]
    assert corrected(token(0.0, 0.0, count=5)).tolist() == [0.0, 0.0]
    least = corrected(token(0.5, 0.5, count=2))  # s² would be 0: it is ‖μ‖² / 4
    assert least.tolist() == pytest.approx([2**0.5, 2**0.5])


def test_a_small_client_finds_its_task_where_the_plain_cosine_falls_below_the_threshold(setup: Setup) -> None:
    """The task's mean is (0.6, 0, 0), features of norm 1 around it; a client with five lies at 31° of it."""
    whole, few = token(0.6, 0.0, 0.0, count=10_000), token(0.6, 0.3, 0.2, count=5)
    for matching, there in (("corrected", 0), ("plain", 1)):  # cos = 0.86; corrected 0.98
        assert meeting(with_subspaces(Strata(replace(SEEN, matching=matching), setup), whole), few) == {0: there}


def test_both_text_and_picture_must_match(setup: Setup) -> None:
    """Two numbers of text, two of the picture. Text alone decides as in DISCO; a picture splits, and never joins."""
    told = replace(setup, words=2, words_tau=0.5)
    here = token(1.0, 0.0, 1.0, 0.0)
    for value, place in (
        ((1.0, 0.0, 1.0, 0.0), 0),
        ((0.6, 0.8, 1.0, 0.1), 0),  # the text's own threshold
        ((0.0, 1.0, 1.0, 0.0), 1),  # another text
        ((1.0, 0.0, 0.7, 0.7), 1),  # another picture, with a mean cosine of 0.85
    ):
        strategy = with_subspaces(Strata(StrataConfig(min_open=3), told), here)
        assert meeting(strategy, token(*value)) == {0: place}
    blind = with_subspaces(Strata(StrataConfig(token="text", min_open=3), told), token(1.0, 0.0))
    assert meeting(blind, token(0.6, 0.8), token(0.0, 1.0)) == {0: 0, 1: 1}


def test_equal_matches_go_to_the_likest(setup: Setup) -> None:
    cache = (token(1.0, 0.2, 1.0, 0.0), token(1.0, 0.0, 1.0, 0.0))
    strategy = with_subspaces(Strata(StrataConfig(min_open=3), replace(setup, words=2)), *cache)
    assert meeting(strategy, token(1.0, 0.0, 1.0, 0.0), token(1.0, 0.2, 1.0, 0.0)) == {0: 1, 1: 0}


def test_few_pictures_open_nothing(setup: Setup) -> None:
    strategy = Strata(StrataConfig(token="image"), setup)
    assert meeting(strategy, token(1.0, 0.0, count=9), token(0.0, 1.0, count=10)) == {1: 0}


def test_a_token_is_folded_in_once_for_each_state_of_its_data(setup: Setup, train_reply: Any) -> None:
    """Two rounds of the same ten instructions, then other clients' 20 and 15: 45 in all."""
    strategy = Strata(SEEN, setup)
    counts = []
    for each in (token(1.0, 0.0), token(1.0, 0.0), token(1.0, 0.1, count=20), token(1.0, 0.2, count=15)):
        train(strategy, train_reply, each)
        counts.append(strategy.state.subspaces[0].token.count)
    assert counts == [10, 10, 30, 45]
    again = Strata(SEEN, setup)
    again.load(strategy.save())
    train(again, train_reply, token(1.0, 0.1, count=20))
    assert again.state.subspaces[0].token.count == 45
    train(again, train_reply, token(0.0, 1.0), token(1.0, 0.0))  # 1 has an equal token, and counts
    assert [subspace.token.count for subspace in again.state.subspaces] == [
        55,
        10,
    ]  # another client with an equal token counts


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"picture_tau": 2.0}, "strategy.picture_tau: must be a cosine between -1 and 1"),
        ({"token_noise": 1.0}, "strategy.matching: must be plain with strategy.token_noise"),
        ({"matching": "best"}, r"strategy.matching: must be corrected | plain, got 'best'"),
        ({"start": "warm"}, r"strategy.start: must be sibling | nearest | fresh, got 'warm'"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        StrataConfig(**options)


# where a subspace begins


def test_a_new_subspace_starts_as_the_one_with_the_nearest_token(setup: Setup, sent: Callable[..., Any]) -> None:
    strategy = with_subspaces(Strata(SEEN, setup), token(1.0, 0.0, 0.0), token(0.0, 1.0, 0.0))
    assert meeting(strategy, token(0.0, 0.6, 0.8), token(1.0, 0.0, 0.0)) == {0: 2, 1: 0}
    assert sent(strategy) == {0: (2, [1.0, 1.0, 1.0]), 1: (0, [0.0, 0.0, 0.0])}


def test_only_a_question_that_is_known_starts_warm(setup: Setup, sent: Callable[..., Any]) -> None:
    """Two numbers of text, two of the picture: a known question with new pictures, a new one with known pictures."""
    told = replace(setup, words=2, words_tau=0.5)
    cache = (token(0.0, 1.0, 0.0, 1.0), token(1.0, 0.0, 1.0, 0.0))
    known, new = token(1.0, 0.0, 0.0, 1.0), token(-0.8, -0.6, 1.0, 0.0)
    starts = {}
    for start in ("sibling", "nearest"):
        strategy = with_subspaces(Strata(StrataConfig(start=start), told), *cache)
        assert meeting(strategy, known, new) == {0: 2, 1: 3}
        starts[start] = [adapter for _, adapter in sent(strategy).values()]
    drawn = fresh(setup.layout, setup.rank, setup.seed, 3, init=setup.init).tolist()
    assert starts == {"sibling": [[1.0] * 3, drawn], "nearest": [[0.0] * 3, [1.0] * 3]}


def test_the_first_subspace_and_start_fresh_are_drawn_as_discos(setup: Setup, sent: Callable[..., Any]) -> None:
    for ours in (Strata(SEEN, setup), with_subspaces(Strata(replace(SEEN, start="fresh"), setup), token(1.0, 0.0))):
        theirs = Disco(SEEN, setup)
        theirs.state = ours.state
        assert meeting(ours, token(0.0, 1.0)) == meeting(theirs, token(0.0, 1.0))
        assert sent(ours) == sent(theirs)


def test_domains_of_one_prompt_get_subspaces_of_their_own(federate: Any) -> None:
    words = ("scenario.name=fcit-mini-small-domain", "federation.rounds_per_stage=1", "evaluate.shard=20")
    disco, strata = federate("disco", *words), federate("strata", *words)
    assert (disco.summary["subspaces"], strata.summary["subspaces"]) == (1, 2)
    assert strata.summary["forgetting"] <= disco.summary["forgetting"]
    assert strata.summary["bytes_up"] < disco.summary["bytes_up"]  # its tokens are longer, and eight bits a number
