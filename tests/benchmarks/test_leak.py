"""The measurement of leaks runs real rounds and reads real memory."""

from fedstrata.benchmarks import leak


def test_memory_is_read_after_the_early_and_the_last_round() -> None:
    found = leak.bench(quick=True)
    assert {pair["round"] for pair in found.pairs} == {4, 8}
    assert all(pair["MB"] > 50 for pair in found.pairs)
    assert 0.5 < found.limits[leak.GROWTH] < 2
