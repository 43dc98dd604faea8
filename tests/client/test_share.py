"""Which examples a client-round trains on."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fedstrata.client.world import share
from fedstrata.core.config import RunConfig
from fedstrata.core.errors import BadInput
from fedstrata.core.records import Assignment, Binding
from fedstrata.scenarios.arrival import ArrivalRule, timeline
from fedstrata.scenarios.stream import Example, Scenario, Task


def scenario(rows: int, rule: ArrivalRule | None = None) -> Scenario:
    """One task in two stages of two rounds; client 0 holds all of it, client 1 nothing."""
    train, stages = [Example(str(index), "q", "a") for index in range(rows)], ((0,), (0,))
    task, shares = Task("only", train, train[:1]), ((np.arange(rows), np.arange(0)),)
    when = timeline(rule or ArrivalRule(), stages, shares, 2, 0, ("only",), Path())
    return Scenario("s", (task,), stages, None, shares, when, (frozenset({"a"}),), 1.0, 0, "hash")


def at(part: int = 0, parts: int = 1, client: int = 0, stage: int = 1) -> Assignment:
    return Assignment(Binding("run", stage, 1, client), (0,), part, parts)


@pytest.mark.parametrize(("rows", "parts"), [(16, 8), (19, 8), (5, 8), (1, 8)])
def test_draws_from_a_pool_are_without_replacement_until_it_is_exhausted(rows: int, parts: int) -> None:
    source, config = scenario(rows), RunConfig()
    size = max(1, rows // parts)
    drawn = Counter(e.id for part in range(rows // size) for e in share(source, config, at(part, parts)))
    assert drawn == Counter(e.id for e in source.tasks[0].train)


def test_a_new_cycle_has_a_new_order() -> None:
    source, config = scenario(64), RunConfig()
    first = [e.id for part in range(8) for e in share(source, config, at(part, 8))]
    second = [e.id for part in range(8, 16) for e in share(source, config, at(part, 8))]
    assert sorted(first) == sorted(second)
    assert first != second


def test_the_size_of_a_draw_is_an_equal_share() -> None:
    sizes = [len(share(scenario(64), RunConfig(), at(part, 8))) for part in range(8)]
    assert np.ptp(sizes) == 0
    assert sum(sizes) == 64


def test_a_client_without_data_is_named() -> None:
    with pytest.raises(BadInput, match="client 1: has no examples"):
        share(scenario(4), RunConfig(), at(client=1))


def test_a_client_trains_on_what_exists_at_its_time_and_joint_training_on_all() -> None:
    source, config = scenario(9, ArrivalRule(repeats="fresh")), RunConfig()
    first, second = ([e.id for e in share(source, config, at(stage=stage))] for stage in (1, 2))
    assert (len(first), len(second)) == (5, 4)
    assert sorted(first + second) == sorted(map(str, range(9)))
    pooled = [e.id for part in range(2) for e in share(source, config, at(part, 2))]
    assert sorted(pooled) == sorted(map(str, range(9)))
