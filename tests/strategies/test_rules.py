"""Robust rules: known answers, laws, and what each of them holds against."""

import numpy as np
import pytest

from fedstrata.strategies import rules
from fedstrata.strategies.rules import RULES, Matrix

ONE = np.ones(5)


def honest(number: int = 16, size: int = 2000, seed: int = 0) -> Matrix:
    """Updates around a common direction of length 1, each with its own deviation."""
    draw = np.random.default_rng(seed)
    centre = draw.normal(size=size)
    return centre / np.linalg.norm(centre) + 0.5 * draw.normal(size=(number, size)) / np.sqrt(size)


def test_known_answers() -> None:
    rows = np.array([[0.0], [1.0], [2.0], [3.0], [100.0]])
    assert rules.mean(rows, np.array([1.0, 1, 1, 1, 0]))[0] == 1.5
    assert rules.median(rows, ONE)[0] == 2
    assert rules.trimmed(rows, ONE, 1)[0] == 2
    assert rules.multikrum(rows, ONE, 1)[0] == 1.5
    assert rules.geomedian(rows, ONE)[0] == pytest.approx(2, abs=1e-3)


def test_the_geometric_median_of_a_triangle_is_its_fermat_point() -> None:
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(3) / 2]])
    assert rules.geomedian(corners, np.ones(3)) == pytest.approx([0.5, np.sqrt(3) / 6], abs=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_one_update_is_itself(name: str) -> None:
    row = np.array([[1.0, -2.0, 3.0]])
    assert RULES[name](row, np.array([7.0]), 1) == pytest.approx(row[0])


@pytest.mark.parametrize("name", RULES)
def test_equal_updates_give_that_update(name: str) -> None:
    rows = np.tile(np.array([0.5, -1.0]), (6, 1))
    assert RULES[name](rows, np.arange(1.0, 7.0), 2) == pytest.approx(rows[0])


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("number", [1, 2, 3, 4, 7, 16])
def test_the_order_of_clients_does_not_matter(name: str, number: int) -> None:
    rows, counts = honest(number), np.arange(1.0, number + 1)
    order = np.random.default_rng(1).permutation(number)
    assert RULES[name](rows[order], counts[order], 2) == pytest.approx(RULES[name](rows, counts, 2), abs=1e-9)


@pytest.mark.parametrize("name", [name for name in RULES if name != "mean"])
def test_four_of_twenty_hostile_updates_do_not_carry_a_robust_rule_away(name: str) -> None:
    good = honest(16)
    bad = np.tile(-5 * good.mean(axis=0), (4, 1))
    rows, counts = np.vstack([good, bad]), np.ones(20)
    centre = good.mean(axis=0)

    def error(found: Matrix) -> float:
        return float(np.linalg.norm(found - centre) / np.linalg.norm(centre))

    assert error(RULES[name](rows, counts, 4)) < 0.5
    assert error(rules.mean(rows, counts)) > 1


def test_krum_leaves_out_who_is_far_from_the_others() -> None:

    rows = np.vstack([honest(8, 50), 20 * honest(2, 50, seed=3)])
    far = rules._distances(rows)
    assert far == pytest.approx(((rows[:, None] - rows[None]) ** 2).sum(axis=2), rel=1e-6, abs=1e-9)
    assert rules.multikrum(rows, np.ones(10), 2) == pytest.approx(rows[:8].mean(axis=0), abs=1e-9)


@pytest.mark.parametrize("length", [1e3, 1e6, 1e9])
def test_the_geometric_median_is_as_fine_beside_a_long_update(length: float) -> None:
    """Three honest points and one far away: it stays within the honest ones, however far that is."""
    rows = np.array([[0.01, 0.0], [0.0, 0.01], [0.0, 0.0], [-length, -length]])
    found = rules.geomedian(rows, np.ones(4))
    assert np.abs(found).max() < 0.01
    assert rules.geomedian(np.zeros((3, 2)), np.ones(3)).tolist() == [0, 0]
