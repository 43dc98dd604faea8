"""The measurements of whole rounds run, and both sides compute the same."""

from fedstrata.benchmarks import e2e, overhead


def test_overhead_trains_the_same_twice() -> None:
    found = overhead.bench(quick=True)
    assert set(found.limits) == set(found.targets)
    assert found.equal["largest difference of a round's aggregate"] < 1e-6
    assert [set(pair) for pair in found.pairs] == [{"round", "training alone"}]


def test_a_round_equals_stock_flowers() -> None:
    found = e2e.bench(quick=True)
    assert list(found.ratios) == list(found.targets) == [e2e.KEPT, e2e.FRESH]
    assert all(ratio > 0 for ratio in found.ratios.values())
    assert found.equal["first round, ‖difference‖ / ‖update‖"] < 1e-3
