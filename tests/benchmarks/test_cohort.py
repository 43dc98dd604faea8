"""The cohort benchmarks at a size of seconds: what they compare, and that differing results end them."""

import importlib.util

import numpy as np
import pytest
import torch

from fedstrata.benchmarks import cohort_ops, cohort_small, cohort_tiny, sides
from fedstrata.benchmarks.cohorts import Sizes, cohort, far, work
from fedstrata.benchmarks.peers import PeftLoop
from fedstrata.core.adapters import Flat

HAS_PFL = importlib.util.find_spec("pfl") is not None
QUICK = Sizes(hidden=32, layers=1, vocabulary=64, length=12, answer=5, batch=2, rows=3, clients=2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the peers' own libraries
def test_tiny_stands_beside_every_peer_with_equal_results() -> None:
    result = cohort_tiny.bench(quick=True)
    names = [sides.PEFT, sides.TRAINER, sides.TEMPLATE, *[sides.PFL] * HAS_PFL]
    assert list(result.ratios) == names
    assert list(result.targets.values()) == [4.0, 40.0, 40.0, 3.0][: len(names)]
    assert [set(pair) for pair in result.pairs] == [{sides.OURS, *names}]
    assert all(apart < 1e-3 for apart in result.equal.values())
    assert len(result.equal) == len(names)
    assert result.json()["ratio"] == result.ratios[sides.PEFT] > 0
    assert HAS_PFL or any("pfl is not installed" in note for note in result.notes)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_small_says_how_it_multiplies_and_what_the_products_alone_take() -> None:
    precision = torch.get_float32_matmul_precision()
    result = cohort_small.bench(quick=True)
    assert {sides.PEFT} <= set(result.targets) <= {sides.PEFT, sides.PFL}
    assert result.targets[sides.PEFT] == 2.2
    assert any(note.startswith("float32 products of ours: ") for note in result.notes)
    assert any(note.startswith("the products with the base's frozen weights alone") for note in result.notes)
    assert torch.get_float32_matmul_precision() == precision


def test_operations_are_counted_the_same_every_time() -> None:
    first, second = (cohort_ops.bench(quick=True) for _ in range(2))
    assert first.ratios == second.ratios
    assert first.targets == {cohort_ops.PEER: 12.0}
    assert first.pairs[0][cohort_ops.PEER] > 500  # 4 layers of 7 adapted Linears, forward, backward and AdamW
    assert next(iter(first.ratios.values())) > 2  # two clients share every call


def test_views_are_not_counted() -> None:
    x = torch.ones(4, 4)
    assert sum(cohort_ops.count(lambda: x.view(2, 8).t().unsqueeze(0)).values()) == 0
    assert sum(cohort_ops.count(lambda: (x @ x).t().add_(1)).values()) == 2


def test_a_cohort_of_16_needs_a_twelfth_of_the_operations() -> None:
    """The target itself: it is a count, so a test may hold it."""
    assert cohort_ops.bench().ratios[cohort_ops.PEER] >= 12


def test_updates_that_differ_end_the_bench() -> None:
    with work(QUICK) as given:
        ours, start = cohort(given), given.jobs[0].flat
        theirs: list[Flat] = PeftLoop(given).round()
        assert sides.same(theirs, ours, given) == far(ours, theirs, start) < 1e-4
        assert sides.same(np.mean(theirs, axis=0), ours, given) < 1e-4
        wrong = [theirs[1], theirs[0]]
        with pytest.raises(AssertionError, match="the updates differ by"):
            sides.same(wrong, ours, given)
        assert far([start], [theirs[0]], start) == pytest.approx(1)
