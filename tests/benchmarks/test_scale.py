"""The benchmark `scale` runs, and both sides train the same amount."""

from fedstrata.benchmarks import scale


def test_registered_clients_that_sit_out_change_no_round() -> None:
    found = scale.bench(quick=True)
    assert set(found.limits) == set(found.targets)
    assert all(value > 0 for value in found.limits.values())
    assert found.equal["each round"].startswith("4 clients, ")
