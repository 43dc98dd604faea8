"""strata's three changes by hand, each with its other value DISCO, and what the first two are for end to end."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedstrata.core.errors import BadInput
from fedstrata.core.identity import Token
from fedstrata.strategies.base import Participant, Setup
from fedstrata.strategies.disco import Disco
from fedstrata.strategies.organisation import Subspace, place
from fedstrata.strategies.strata import Strata, StrataConfig, corrected, products

TEXT = StrataConfig(token="image", tau=0.9)  # features of norm 1: examples below stay small


def token(*values: float, count: int = 10) -> Token:
    return Token(np.array(values, dtype=np.float32), count)


def meeting(strategy: Disco, *tokens: Token) -> dict[int, int]:
    strategy.meet([Participant(partition + 2, partition, each) for partition, each in enumerate(tokens)])
    return dict(strategy.placement())


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
        scaled = corrected(Token(mean.astype(np.float32), 3), 1.0)
        squares.append(float(mean @ mean) / float(scaled @ scaled))  # s² = ‖μ‖² / ‖μ/s‖²
    assert np.mean(squares) == pytest.approx(0.5)  # ‖(½, ½)‖²
    assert np.mean([mean @ mean for mean in draws]) == pytest.approx(2 / 3)


def test_equal_instructions_need_no_correction_and_one_alone_has_none() -> None:
    assert corrected(token(0.6, 0.8, count=7), 1.0).tolist() == pytest.approx([0.6, 0.8])
    assert corrected(token(0.0, 2.0, count=1), 1.0).tolist() == [0.0, 1.0]
    assert corrected(token(0.0, 0.0, count=5), 1.0).tolist() == [0.0, 0.0]
    least = corrected(token(0.5, 0.5, count=2), 1.0)  # s² would be 0: it is ‖μ‖² / 4
    assert least.tolist() == pytest.approx([2**0.5, 2**0.5])
    assert products([[3.0, 0.0]], [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]).tolist() == [[1.0, -1.0, 0.0]]


def test_a_small_client_finds_its_task_where_the_plain_cosine_falls_below_the_threshold() -> None:
    """The task's mean is (0.6, 0, 0), features of norm 1 around it; a client with five lies at 31° of it."""
    whole, few = token(0.6, 0.0, 0.0, count=10_000), token(0.6, 0.3, 0.2, count=5)
    plain = place([few], np.stack([whole.value]), 0.9, 1)
    assert plain == [1]  # a new subspace: cos = 0.86
    known = np.stack([corrected(whole, 1.0)])
    assert place([Token(corrected(few, 1.0), 5)], known, 0.9, 1, products) == [0]


def test_with_matching_plain_places_are_discos(setup: Setup) -> None:
    tokens = [token(1.0, 0.0, count=4), token(0.5, 0.5, count=3), token(0.9, 0.1, count=8)]
    ours = with_subspaces(Strata(replace(TEXT, matching="plain"), setup), token(1.0, 0.1))
    theirs = Disco(replace(TEXT, matching="plain"), setup)
    theirs.state = ours.state
    assert meeting(ours, *tokens) == meeting(theirs, *tokens)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"token": "text"}, "strategy.matching: must be plain with strategy.token=text"),
        ({"token_noise": 1.0}, "strategy.matching: must be plain with strategy.token_noise"),
        ({"matching": "best"}, r"strategy.matching: must be corrected | plain, got 'best'"),
        ({"start": "warm"}, r"strategy.start: must be nearest | fresh, got 'warm'"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        StrataConfig(**options)


# where a subspace begins


def test_a_new_subspace_starts_as_the_one_with_the_nearest_token(setup: Setup, sent: Callable[..., Any]) -> None:
    strategy = with_subspaces(Strata(TEXT, setup), token(1.0, 0.0, 0.0), token(0.0, 1.0, 0.0))
    assert meeting(strategy, token(0.0, 0.6, 0.8), token(1.0, 0.0, 0.0)) == {0: 2, 1: 0}
    assert sent(strategy) == {0: (2, [1.0, 1.0, 1.0]), 1: (0, [0.0, 0.0, 0.0])}


def test_the_first_subspace_and_start_fresh_are_drawn_as_discos(setup: Setup, sent: Callable[..., Any]) -> None:
    for ours in (Strata(TEXT, setup), with_subspaces(Strata(replace(TEXT, start="fresh"), setup), token(1.0, 0.0))):
        theirs = Disco(TEXT, setup)
        theirs.state = ours.state
        assert meeting(ours, token(0.0, 1.0)) == meeting(theirs, token(0.0, 1.0))
        assert sent(ours) == sent(theirs)


def test_domains_of_one_prompt_get_subspaces_of_their_own(federate: Any) -> None:
    words = ("scenario.name=fcit-mini-short-domain", "federation.rounds_per_stage=1", "evaluate.shard=20")
    disco, strata = federate("disco", *words), federate("strata", *words)
    assert (disco.summary["subspaces"], strata.summary["subspaces"]) == (1, 2)
    assert strata.summary["forgetting"] <= disco.summary["forgetting"]
    token_bytes = 4 * 129 * 4  # the picture's 129 numbers beside the text's, at most once for each of four clients
    assert 0 < strata.summary["bytes_up"] - disco.summary["bytes_up"] <= token_bytes
