"""The federation's small functions: who takes part, how often, and how much data that is."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedstrata.client.world import share
from fedstrata.core.config import FederationSection, RunConfig
from fedstrata.core.records import Assignment, Binding
from fedstrata.scenarios.arrival import ArrivalRule, timeline
from fedstrata.scenarios.dealing import Shares
from fedstrata.scenarios.stream import Example, Scenario, Task
from fedstrata.server.participation import Visit, draw, earlier, participants, share_size, visits

CONFIG = RunConfig(federation=FederationSection(clients=20, clients_per_round=5, rounds_per_stage=4))
ALL = range(20)


def scenario(*sizes: int) -> Scenario:
    """One client; task t holds `sizes[t]` examples named t-0, t-1, …, all of them the client's."""
    return dealt(tuple((np.arange(size),) for size in sizes), tuple((t,) for t in range(len(sizes))))


def dealt(
    shares: tuple[Shares, ...], stages: tuple[tuple[int, ...], ...], rule: ArrivalRule | None = None, at: Path = Path()
) -> Scenario:
    """Tasks `task-0`, … whose rows are all at clients; stages of four rounds."""
    tasks = tuple(
        Task(f"task-{t}", tuple(Example(f"{t}-{row}", "?", "!") for row in range(sum(map(len, hands)))), ())
        for t, hands in enumerate(shares)
    )
    names = [task.name for task in tasks]
    when = timeline(rule or ArrivalRule(), stages, shares, 4, 0, names, at)
    return Scenario("made", tasks, stages, None, shares, when, (frozenset(),) * len(shares), None, 0, "")


def twenty() -> Scenario:
    """Three stages of one task, a row of it at each of twenty clients."""
    return dealt((tuple(np.array([row]) for row in ALL),), ((0,),) * 3)


def drawn(pool: Scenario, part: int, parts: int, config: RunConfig = CONFIG) -> list[str]:
    """The ids of the part-th of `parts` draws from the pooled data of client 0."""
    at = Assignment(Binding(partition=0), tuple(range(len(pool.tasks))), part, parts)
    return [example.id for example in share(pool, config, at)]


def test_a_draw_is_a_function_of_seed_stage_and_round() -> None:
    first = draw(CONFIG, ALL, 2, 3)
    assert draw(CONFIG, ALL, 2, 3) == first
    for other in (draw(CONFIG, ALL, 3, 2), draw(CONFIG, ALL, 2, 4), draw(replace(CONFIG, seed=1), ALL, 2, 3)):
        assert other != first


def test_a_draw_takes_each_client_once_at_most() -> None:
    for round_ in range(1, 50):
        clients = draw(CONFIG, ALL, 1, round_)
        assert len(set(clients)) == len(clients) == 5
        assert set(clients) <= set(range(20))


def test_a_draw_from_fewer_clients_than_asked_for_takes_all() -> None:
    assert sorted(draw(CONFIG, range(3), 1, 1)) == [0, 1, 2]


def test_every_client_is_drawn_equally_often_in_the_long_run() -> None:
    counts = Counter(client for round_ in range(1, 801) for client in draw(CONFIG, ALL, 1, round_))
    assert sum(counts.values()) == 4000
    assert all(130 <= counts[client] <= 270 for client in range(20))  # 200 each, five standard deviations around it


def test_positions_are_drawn_too() -> None:
    # a heterogeneous schedule gives tasks by position, so the first place must not always be the smallest client's
    assert any(draw(CONFIG, ALL, 1, round_) != sorted(draw(CONFIG, ALL, 1, round_)) for round_ in range(1, 9))


def test_only_clients_that_are_present_are_drawn() -> None:
    present = [1, 4, 6, 9, 12, 13, 19]
    for round_ in range(1, 30):
        chosen = draw(CONFIG, present, 1, round_)
        assert len(set(chosen)) == len(chosen) == 5
        assert set(chosen) <= set(present)
        assert chosen == [present[place] for place in draw(CONFIG, range(7), 1, round_)]
    assert draw(CONFIG, [], 1, 1) == []


@pytest.mark.parametrize("sampling", ["seeded", "fcit"])
def test_whoever_is_absent_is_not_drawn_by_either_sampling(sampling: str) -> None:
    config = replace(CONFIG, federation=replace(CONFIG.federation, sampling=sampling))
    assert sorted(draw(config, [3, 8], 2, 1)) == [3, 8]
    assert set(draw(config, range(10, 20), 2, 1)) <= set(range(10, 20))


def test_before_the_first_round_nobody_took_part() -> None:
    assert earlier(CONFIG, twenty(), 1, 1) == Counter()


def test_earlier_counts_all_rounds_before_and_not_this_one() -> None:
    by_hand: Counter[int] = Counter()
    for stage in (1, 2, 3):
        for round_ in (1, 2, 3, 4):
            assert earlier(CONFIG, twenty(), stage, round_) == by_hand
            by_hand.update(draw(CONFIG, ALL, stage, round_))
    assert sum(earlier(CONFIG, twenty(), 3, 4).values()) == 11 * 5


def test_visits_are_the_draws_of_a_stage() -> None:
    found = list(visits(CONFIG, twenty(), 2))
    assert found[0] == Visit(2, 1, 0, draw(CONFIG, ALL, 2, 1)[0], (0,))
    assert [(v.round, v.client) for v in found] == [(r, c) for r in (1, 2, 3, 4) for c in draw(CONFIG, ALL, 2, r)]


@pytest.fixture
def leaving(tmp_path: Path) -> Scenario:
    """Client 0 goes after round 2, client 1 holds nothing of its task from round 5 on, client 3 nothing at all."""
    told = [{"client": client, "round": 1, "tasks": ["task-0"]} for client in range(4)]
    told += [{"client": 0, "round": 3, "tasks": []}, {"client": 1, "round": 5, "tasks": ["task-1"]}]
    (tmp_path / "trace.json").write_text(json.dumps(told))
    none = np.arange(0)
    shares = (np.arange(3), np.arange(3, 6), np.arange(6, 9), none), (np.arange(2), none, none, none)
    return dealt(shares, ((0,), (1,)), ArrivalRule("trace", file="trace.json"), tmp_path)


def test_who_is_absent_or_has_nothing_to_train_visits_nobody(leaving: Scenario) -> None:
    found = [visit for stage in (1, 2) for visit in visits(CONFIG, leaving, stage)]
    times = [(stage, round_) for stage in (1, 2) for round_ in (1, 2, 3, 4)]
    by_round = [{v.client for v in found if (v.stage, v.round) == at} for at in times]
    assert by_round == [{0, 1, 2}] * 2 + [{1, 2}] * 2 + [{2}] * 4
    assert {v.tasks for v in found} == {(0,)}


def test_a_method_that_pools_all_tasks_draws_from_all_clients_at_all_times(leaving: Scenario) -> None:
    for stage, round_ in ((1, 1), (1, 4), (2, 1)):
        assert sorted(participants(CONFIG, leaving, stage, round_, pooled=True)) == [0, 1, 2, 3]
    assert sorted(participants(CONFIG, leaving, 1, 4)) == [1, 2]
    assert earlier(CONFIG, leaving, 1, 4) == dict.fromkeys(range(4), 3)


def test_a_participant_whose_place_gives_it_nothing_leaves_the_other_places_as_they_are() -> None:
    none = np.arange(0)
    hands = ((np.arange(3), none, none), (np.arange(3), np.arange(3, 5), np.arange(5, 6)))
    pool = replace(dealt(hands, ((0, 1),)), assign=(((0,), (1,)),))
    found = list(visits(CONFIG, pool, 1))
    for round_ in (1, 2, 3, 4):
        drawn = draw(CONFIG, range(3), 1, round_)
        places = [(place, client) for place, client in enumerate(drawn) if place == 1 or client == 0]
        assert [(v.position, v.client) for v in found if v.round == round_] == places


@pytest.mark.parametrize(
    ("pool", "parts", "sizes"),
    [
        (12, 4, [3, 3, 3, 3]),
        (14, 4, [3, 3, 3, 5]),  # the last draw of a cycle takes the rest
        (3, 8, [1, 1, 1]),  # a pool smaller than the number of parts gives one at a time
        (1, 8, [1]),
        (7, 1, [7]),
    ],
)
def test_one_cycle_of_draws_by_hand(pool: int, parts: int, sizes: list[int]) -> None:
    assert [share_size(pool, part, parts) for part in range(len(sizes))] == sizes
    assert [share_size(pool, part, parts) for part in range(len(sizes), 2 * len(sizes))] == sizes  # and again


def test_a_client_without_data_draws_nothing() -> None:
    assert [share_size(0, part, 8) for part in range(3)] == [0, 0, 0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any), st.integers(1, 9), st.integers(0, 30))
def test_the_server_knows_how_many_examples_a_client_draws(sizes: list[int], parts: int, part: int) -> None:
    assert share_size(sum(sizes), part, parts) == len(drawn(scenario(*sizes), part, parts))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any), st.integers(2, 9), st.integers(0, 3))
def test_every_example_of_a_pool_is_drawn_once_per_cycle(sizes: list[int], parts: int, cycle: int) -> None:
    pool, total = scenario(*sizes), sum(sizes)
    draws = total // max(1, total // parts)
    ids = [name for part in range(cycle * draws, (cycle + 1) * draws) for name in drawn(pool, part, parts)]
    assert sorted(ids) == sorted(f"{t}-{row}" for t, size in enumerate(sizes) for row in range(size))


def test_every_cycle_has_an_order_of_its_own() -> None:
    pool = scenario(8, 8)
    first = [name for part in range(4) for name in drawn(pool, part, 4)]
    second = [name for part in range(4, 8) for name in drawn(pool, part, 4)]
    assert sorted(first) == sorted(second)
    assert first != second


def test_a_draw_mixes_the_tasks_of_the_pool() -> None:
    assert {name[0] for name in drawn(scenario(20, 20), 0, 2)} == {"0", "1"}


def test_a_client_that_draws_all_gets_its_share_in_order() -> None:
    assert drawn(scenario(2, 1), 0, 1) == ["0-0", "0-1", "1-0"]


def test_another_seed_draws_other_examples() -> None:
    pool = scenario(30)
    assert drawn(pool, 0, 3) == drawn(pool, 0, 3)
    assert drawn(pool, 0, 3) != drawn(pool, 0, 3, replace(CONFIG, seed=1))
