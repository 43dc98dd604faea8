"""`bench bytes`, quick: real messages of a small model, and the real model's layout."""

import pytest

from fedstrata.benchmarks import bytes as bench_bytes


def test_the_quick_bench_counts_every_upload() -> None:
    result = bench_bytes.bench(quick=True)
    assert list(result.ratios) == [f"published code ({kind})" for kind in ("bfloat16", "int8", "float32")]
    assert result.limits["error of float32 / update"] == 0
    assert 0 < result.limits["error of bfloat16 / update"] < 0.003
    assert 0 < result.limits["error of int8 / update"] <= result.targets["error of int8 / update"] == 0.01
    numbers = result.pairs[0]["numbers"]
    sizes = {pair["upload"]: pair["bytes"] - 4 * 768 for pair in result.pairs}
    assert sizes == {"bfloat16": 2 * numbers, "int8": numbers + 2 * -(-numbers // 64), "float32": 4 * numbers}


def test_the_layout_is_the_published_models() -> None:
    layout = bench_bytes.seven_billion()
    assert len(layout.modules) == 96  # three of the feed-forward network in each of 32 layers
    assert layout.width * 8 == pytest.approx(11.60e6, rel=1e-3)
    assert layout.tail == pytest.approx(20.98e6, rel=1e-3)
    assert bench_bytes.published(layout) == pytest.approx(228e6, rel=5e-3)
