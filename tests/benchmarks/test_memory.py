"""`fedstrata bench memory`: what it measures, at a size that takes seconds."""

import sys

import pytest

from fedstrata.benchmarks import memory


@pytest.mark.skipif(sys.platform != "linux", reason="the proportional set size is read from /proc")
def test_workers_that_map_the_base_need_far_less_than_workers_that_copy_it() -> None:
    result = memory.bench(quick=True)
    assert (result.name, result.clock, list(result.ratios)) == ("memory", "MB", [memory.COPIES])
    assert result.targets == {memory.LIMIT: 1.15}
    assert set(result.limits) == {memory.LIMIT}
    assert result.ratios[memory.COPIES] > 1.4
    assert set(result.pairs[0]) == {"mapped", memory.COPIES}
    assert len(result.equal[memory.TRAINED]) == 64
    assert result.json()["ratio"] == result.ratios[memory.COPIES]
