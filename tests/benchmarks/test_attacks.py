"""`bench attacks`, quick: planted clients, the real gate and the real strategies."""

from typing import Any

import pytest

from fedstrata.benchmarks import attacks
from fedstrata.benchmarks.measure import Result


@pytest.fixture(scope="module")
def result() -> Result:
    return attacks.bench(quick=True)


def cell(result: Result, case: str, attack: str, rule: str) -> dict[str, Any]:
    (row,) = [
        r for r in result.pairs if r["case"].startswith(case) and r["attack"].startswith(attack) and r["rule"] == rule
    ]
    return dict(row)


def test_clipping_to_the_median_holds_a_fifth_of_hostile_clients_below_two_honest_spreads(result: Result) -> None:
    assert result.limits["mean, clip=median"] < 2
    assert result.limits["product, clip=median"] < 2
    assert result.limits["mean"] > 2  # the measurement can fail


def test_without_the_gate_one_nan_is_the_model_and_with_it_nothing(result: Result) -> None:
    assert cell(result, "one subspace", "NaN", "mean, no gate")["error"] is None
    gated = cell(result, "one subspace", "NaN", "mean")
    assert gated["refused"] == 4
    assert gated["error"] < 0.1


def test_a_gauge_that_ruins_the_mean_of_factors_does_nothing_to_products(result: Result) -> None:
    assert cell(result, "one subspace", "gauge", "mean")["error"] > 0.5
    assert cell(result, "one subspace", "gauge", "product")["error"] < 0.1


def test_a_subspace_whose_clients_are_mostly_hostile_is_held_by_no_rule(result: Result) -> None:
    case = "four subspaces of five, three"
    assert all(cell(result, case, "sign flip", rule)["error"] > 0.9 for rule in attacks.RULES)
    assert all(cell(result, case, "sign flip", rule)["error"] < 2 for rule in attacks.RULES if "clip" in rule)


def test_who_sends_another_tasks_token_gets_into_its_subspace_and_no_further(result: Result) -> None:
    case = "four subspaces of five, four clients of others"
    assert cell(result, case, "sign flip", "mean")["error"] > 1
    assert "bit for bit" in result.equal.values()  # asserted while it ran: the other subspaces
