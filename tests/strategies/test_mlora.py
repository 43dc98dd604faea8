"""M-LoRA: a LoRA a stage, trained apart, and the mean of what they do."""

from typing import Any

import numpy as np
import pytest

from fedstrata.core.adapters import Layout, fresh
from fedstrata.strategies.base import Parts, Setup
from fedstrata.strategies.mlora import MLora, MLoraConfig, mean
from fedstrata.strategies.staged import apart, joined

LAYOUT = Layout((("a", 3, 4), ("b", 2, 5)))


def drawn(number: int, rank: int = 2) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.normal(size=LAYOUT.size(rank)).astype(np.float32) for _ in range(number)]


def test_the_mean_is_of_what_the_adapters_do_and_not_of_their_factors() -> None:
    flats = drawn(3)
    one, factors = mean(flats, LAYOUT), LAYOUT.split(np.mean(flats, axis=0))
    for name, (a, b) in LAYOUT.split(one).items():
        deltas = [mine[1] @ mine[0] for mine in (LAYOUT.split(flat)[name] for flat in flats)]
        assert np.allclose(b @ a, np.mean(deltas, axis=0), atol=1e-6)
        assert not np.allclose(factors[name][1] @ factors[name][0], np.mean(deltas, axis=0), atol=1e-1)


def test_one_adapter_is_its_own_mean_and_their_order_does_not_matter() -> None:
    flats = drawn(3)
    assert mean(flats[:1], LAYOUT).tobytes() == flats[0].tobytes()
    products = [
        {name: b @ a for name, (a, b) in LAYOUT.split(mean(order, LAYOUT)).items()} for order in (flats, flats[::-1])
    ]
    assert all(np.allclose(products[0][name], products[1][name], atol=1e-6) for name in products[0])


def test_adapters_that_were_joined_come_apart_bit_for_bit() -> None:
    flats = drawn(3)
    assert [flat.tobytes() for flat in apart(LAYOUT, joined(LAYOUT, *flats), 2)] == [flat.tobytes() for flat in flats]
    assert apart(LAYOUT, np.zeros(0, np.float32), 2) == []


def test_every_stage_begins_from_scratch_and_the_mean_of_all_answers(setup: Setup, train_reply: Any, sent: Any) -> None:
    strategy = MLora(MLoraConfig(), setup)
    for stage, values in enumerate(([1, 2, 3], [7, 8, 9]), start=1):
        strategy.begin_stage(stage)
        assert strategy.state.adapter.tobytes() == fresh(setup.layout, 1, 0, stage - 1).tobytes()
        assert strategy.payload() == {}
        strategy.aggregate_train(stage, [train_reply(0, values)])
    a, b = setup.layout.split(strategy.knowledge().adapters[0])["layer"]
    assert (a.tolist(), b.tolist()) == ([[1, 2], [7, 8]], [[1.5, 4.5]])
    assert strategy.rank_after(2) == 2


def test_a_stage_that_nobody_trained_has_no_part_in_the_mean(setup: Setup, train_reply: Any) -> None:
    strategy = MLora(MLoraConfig(), setup)
    assert strategy.knowledge().adapters[0].tolist()[-1] == 0  # before training: changes nothing
    strategy.begin_stage(1)
    strategy.aggregate_train(1, [train_reply(0, [1, 2, 3])])
    strategy.begin_stage(2)
    strategy.aggregate_train(2, [])
    assert strategy.knowledge().adapters[0].tolist() == [1, 2, 3]
    strategy.begin_stage(3)
    strategy.aggregate_train(3, [train_reply(0, [5, 6, 7])])
    assert strategy.knowledge().adapters[0].tolist() == [1, 2, 5, 6, 1.5, 3.5]


@pytest.mark.parametrize("stages", [1, 2])
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(setup: Setup, train_reply: Any, stages: int) -> None:
    one, other = MLora(MLoraConfig(), setup), MLora(MLoraConfig(), setup)
    for stage in range(1, stages + 1):
        one.begin_stage(stage)
        one.aggregate_train(stage, [train_reply(0, [stage, 2, 3])])
    parts = one.save()
    other.load(Parts(dict(parts.tensors), dict(parts.facts)))
    for strategy in (one, other):
        strategy.begin_stage(stages)  # announced again
        strategy.begin_stage(stages + 1)
    assert one.knowledge().adapters[0].tobytes() == other.knowledge().adapters[0].tobytes()
    assert one.state.adapter.tobytes() == other.state.adapter.tobytes()
