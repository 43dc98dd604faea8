"""The ssa benchmark at a size of seconds: what it compares, and that its sides say the same."""

import numpy as np
import pytest
import torch

from fedstrata.benchmarks import ssa
from fedstrata.benchmarks.measure import Result


@pytest.fixture(scope="module")
def result() -> Result:
    return ssa.bench(quick=True)


def test_it_names_its_sides_and_their_targets(result: Result) -> None:
    assert next(iter(result.ratios)) == ssa.PUBLISHED
    assert result.targets == {ssa.PUBLISHED: 8.0, "mixed / bare base": 1.4, "merged / bare base": 1.05}
    assert set(result.limits) == {"mixed / bare base", "merged / bare base", "merged with its merge / bare base"}
    assert [set(pair) for pair in result.pairs] == [
        {ssa.PUBLISHED, ssa.OURS, ssa.MERGED, ssa.BASE, ssa.MERGING} for _ in range(2)
    ]
    assert result.json()["ratio"] > 1
    assert result.equal["tokens"].startswith("all 32")


def test_answers_that_differ_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    built = ssa.Published.activate

    def wrong(published: ssa.Published, alpha: torch.Tensor) -> None:
        built(published, alpha.flip(0))

    monkeypatch.setattr(ssa.Published, "activate", wrong)
    with pytest.raises(AssertionError, match="answer differently"):
        ssa.bench(quick=True)


def test_mixtures_are_softmax_weights_and_all_different() -> None:
    weights = ssa.mixtures(16, 8)
    assert weights.shape == (16, 8)
    assert np.allclose(weights.sum(axis=1), 1)
    assert weights.min() > 0
    assert len(np.unique(weights, axis=0)) == 16
