"""Every row at exactly one client, by the law, from the seed."""

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from fedstrata.core.errors import BadInput
from fedstrata.scenarios.partition import PARTITIONS, PartitionRule, dirichlet_quantity, iid, largest_remainder

rows, clients, seeds = st.integers(60, 400), st.integers(1, 12), st.integers(0, 2**31)


def holds_each_row_once(shares: tuple[tuple[int, ...], ...], n: int) -> bool:
    return sorted(row for share in shares for row in share) == list(range(n))


@settings(max_examples=60, deadline=None)
@given(rows, clients, st.floats(0.5, 50), seeds, st.integers(1, 3))
def test_dirichlet_gives_every_row_to_one_client_and_honours_min_size(
    n: int, count: int, beta: float, seed: int, min_size: int
) -> None:
    try:
        shares = dirichlet_quantity(n, count, beta, seed, min_size)
    except BadInput:  # many clients, few rows, a small beta: practically never, and the law says so
        reject()
    assert len(shares) == count
    assert holds_each_row_once(shares, n)
    assert min(map(len, shares)) >= min_size
    assert shares == dirichlet_quantity(n, count, beta, seed, min_size)


@settings(max_examples=40, deadline=None)
@given(rows, clients, seeds)
def test_iid_gives_every_row_to_one_client_in_equal_parts(n: int, count: int, seed: int) -> None:
    shares = iid(n, count, seed)
    assert holds_each_row_once(shares, n)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert shares == iid(n, count, seed)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=30), st.integers(0, 10_000))
def test_largest_remainder_adds_up_and_stays_within_one(weights: list[float], n: int) -> None:
    proportions = np.array(weights) / sum(weights)
    sizes = largest_remainder(proportions, n)
    assert sizes.sum() == n
    assert np.abs(sizes - proportions * n).max() < 1 + 1e-6


def test_largest_remainder_by_hand() -> None:
    assert largest_remainder(np.array([0.5, 0.25, 0.25]), 5).tolist() == [3, 1, 1]
    assert largest_remainder(np.array([0.45, 0.35, 0.2]), 10).tolist() == [5, 3, 2]


@pytest.mark.parametrize("beta", [0.5, 5.0])
def test_marginals_approach_the_dirichlet_law_as_n_grows(beta: float) -> None:
    count, n, draws = 5, 20_000, 300
    parts = np.array([[len(share) / n for share in dirichlet_quantity(n, count, beta, seed)] for seed in range(draws)])
    variance = (count - 1) / (count**2 * (count * beta + 1))
    assert parts.mean(axis=0) == pytest.approx(1 / count, abs=4 * (variance / draws) ** 0.5)
    assert parts.var() == pytest.approx(variance, rel=0.2)


@pytest.mark.parametrize("n", [50, 500, 5_000, 50_000])
def test_rounding_vanishes_as_n_grows(n: int) -> None:
    proportions = np.random.default_rng(1).dirichlet(np.ones(10))
    assert np.abs(largest_remainder(proportions, n) / n - proportions).max() <= 1 / n


def test_which_rows_a_client_gets_is_shuffled_and_depends_on_the_seed() -> None:
    first, second = (dirichlet_quantity(200, 4, 1.0, seed) for seed in (0, 1))
    assert first != second
    assert any(share != tuple(range(share[0], share[0] + len(share))) for share in first)


@pytest.mark.parametrize("beta", [1e-300, 1e-9, 1e-3])
def test_a_law_that_cannot_honour_min_size_is_refused(beta: float) -> None:
    with pytest.raises(BadInput, match=r"none of 1000 Dirichlet draws .* 10 clients .* 100 rows; raise beta"):
        dirichlet_quantity(100, 10, beta, 0)


def test_a_huge_beta_is_an_even_split() -> None:
    assert [len(share) for share in dirichlet_quantity(100, 4, 1e308, 0)] == [25] * 4


@pytest.mark.parametrize("kind", PARTITIONS)
def test_too_few_rows_are_refused(kind: str) -> None:
    with pytest.raises(BadInput, match="10 clients with at least 3 rows each need 30 training rows, got 29"):
        PARTITIONS[kind](["a"] * 29, 10, PartitionRule(kind, min_size=3), 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "dirichelt"}, "kind: unknown 'dirichelt'; did you mean 'dirichlet'"),
        ({"beta": 0.0}, "beta: must be a finite number above 0, got 0"),
        ({"beta": -1.0}, "beta: must be"),
        ({"beta": float("inf")}, "beta: must be"),
        ({"beta": float("nan")}, "beta: must be"),
        ({"min_size": 0}, "min_size: must be at least 1"),
    ],
)
def test_a_rule_out_of_range_is_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        PartitionRule(**wrong)  # type: ignore[arg-type]
