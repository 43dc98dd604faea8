"""Identity tokens: cosines and running means by hand."""

import numpy as np
import pytest

from fedstrata.core.identity import Token, cosine, cosines, pooled


def token(count: int, *values: float) -> Token:
    return Token(np.array(values, dtype=np.float32), count)


def test_cosine_by_hand() -> None:
    assert cosine([3, 4], [4, 3]) == pytest.approx(0.96)  # 24 / 25
    assert cosine([1, 0], [0, 2]) == 0
    assert cosine([1, 0], [-5, 0]) == -1


def test_cosine_with_the_zero_vector_is_zero() -> None:
    assert cosine([0, 0], [1, 2]) == 0
    assert cosine([], []) == 0  # what a method without tokens has


def test_cosine_of_tiny_and_huge_float32_vectors_neither_vanishes_nor_overflows() -> None:
    tiny, huge = np.full(2, 1e-30, np.float32), np.full(2, 1e30, np.float32)
    assert cosine(tiny, huge) == pytest.approx(1.0)


def test_cosines_are_rows_against_columns() -> None:
    found = cosines([[3, 4], [0, 0], [1, 0]], [[4, 3], [1, 0]])
    assert found == pytest.approx(np.array([[0.96, 0.6], [0, 0], [0.8, 1]]))


def test_pooled_is_the_mean_weighted_by_counts() -> None:
    both = pooled([token(1, 1, 0), token(3, 0, 1)])
    assert both.value.tolist() == [0.25, 0.75]
    assert both.value.dtype == np.float32
    assert both.count == 4


def test_pooling_step_by_step_equals_pooling_at_once() -> None:
    tokens = [token(2, 1, 0), token(3, 0, 1), token(5, 1, 1)]
    steps = pooled([pooled(tokens[:2]), tokens[2]])
    once = pooled(tokens)
    assert steps.value == pytest.approx(once.value)  # (2+5)/10, (3+5)/10
    assert once.value == pytest.approx([0.7, 0.8])
    assert steps.count == once.count == 10


def test_a_token_pooled_with_itself_a_hundred_times_keeps_its_norm() -> None:
    running = token(10, 0.6, 0.8)
    for _ in range(100):
        running = pooled([running, token(10, 0.6, 0.8)])
    assert running.count == 1010
    assert np.linalg.norm(running.value) == pytest.approx(1.0, abs=1e-5)


def test_tokens_without_a_value_pool_to_none() -> None:
    nothing = pooled([Token(np.zeros(0, np.float32), 2), Token(np.zeros(0, np.float32), 3)])
    assert nothing.value.shape == (0,)
    assert nothing.count == 5
