"""`bench aggregate`, quick: both sides compute the same mean, and ours needs memory for one adapter."""

from fedstrata.benchmarks.aggregate import bench
from fedstrata.core.adapters import Flat


def test_the_quick_bench_measures_both_sides_and_its_memory() -> None:
    result = bench(quick=True)
    assert list(result.ratios) == ["flower", "memcpy"]
    assert (result.targets["flower"], result.targets["memcpy"]) == (5.0, 0.75)
    assert all(0 < peak <= result.targets[name] for name, peak in result.limits.items())
    assert all(distance <= 1e-6 for distance in result.equal.values())
    assert len(result.pairs) == 2
    assert result.json()["ratio"] == result.ratios["flower"]


def test_means_that_differ_end_the_bench() -> None:
    import numpy as np
    import pytest

    from fedstrata.benchmarks import aggregate

    flats: list[Flat] = [np.full(448, value, np.float32) for value in (1, 2, 3, 4)]
    other = aggregate._many(np.full(448, 9, np.float32))
    with pytest.raises(AssertionError, match="computed different means"):
        aggregate._compare(flats[0], other, flats, 4)
