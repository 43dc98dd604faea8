"""When data becomes known: every law by hand, and what must hold of it whatever the numbers."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedstrata.core.errors import BadInput
from fedstrata.scenarios.arrival import ArrivalRule, Clocked, Timeline, describe, timeline
from fedstrata.scenarios.dealing import Shares, iid

STAGES = ((0,), (1, 2), (0, 3))
NAMES = ("names", "charts", "icons", "counting")


def deal(tasks: int, clients: int, rows: int, seed: int = 0) -> tuple[Shares, ...]:
    return tuple(iid(rows + task, clients, seed + task, min_size=0) for task in range(tasks))


SHARES = deal(4, 3, 30)  # ten rows each, and up to one more


def lay(
    rule: ArrivalRule,
    shares: Sequence[Shares] = SHARES,
    stages: Sequence[tuple[int, ...]] = STAGES,
    rounds: int = 2,
    seed: int = 0,
) -> Timeline:
    return timeline(rule, stages, shares, rounds, seed, NAMES, Path())


def rows(when: Timeline, task: int, client: int, stage: int, round_: int = 1) -> list[int]:
    found = when.rows(task, client, stage, round_)
    assert found.dtype == np.int64
    return found.tolist()


def own_stages(rule: ArrivalRule, clients: int, stages: int, rounds: int, seed: int = 0) -> np.ndarray:
    """[client, round of the run]: the client's own stage, told by the task that it has; 0 while it is absent."""
    when = lay(rule, deal(stages, clients, clients), [(task,) for task in range(stages)], rounds, seed)
    times = [(stage, round_) for stage in range(1, stages + 1) for round_ in range(1, rounds + 1)]
    told = [[when.tasks(client, *time) for time in times] for client in range(clients)]
    return np.array([[tasks[0] + 1 if tasks else 0 for tasks in mine] for mine in told])


def test_stages_bring_all_data_at_their_beginning_to_everybody() -> None:
    when = lay(ArrivalRule())
    for stage, tasks in enumerate(STAGES, 1):
        for client in range(3):
            for round_ in (1, 2):
                assert when.tasks(client, stage, round_) == tasks
                for task in tasks:
                    assert rows(when, task, client, stage, round_) == SHARES[task][client].tolist()


@pytest.mark.parametrize("early", [0.05, 0.25, 0.29, 0.5, 0.999])
def test_blurry_brings_a_part_of_each_share_one_stage_before_its_own(early: float) -> None:
    stages, shares = ((0,), (1, 2), (3,)), deal(4, 3, 300)
    when = lay(ArrivalRule("blurry", early=early), shares, stages)
    for client in range(3):
        assert rows(when, 0, client, 1) == shares[0][client].tolist()  # nothing was before the first stage
        for task, stage in ((1, 2), (2, 2), (3, 3)):
            share = shares[task][client].tolist()
            before, then = rows(when, task, client, stage - 1), rows(when, task, client, stage)
            assert len(before) == math.floor(round(early * len(share), 6))
            assert sorted(before + then) == share
            assert (before, then) == (sorted(before), sorted(then))
            others = {1, 2, 3} - {stage - 1, stage}
            assert [rows(when, task, client, other) for other in others] == [[]] * len(others)


def test_blurry_draws_early_rows_by_seed_task_client_and_stage() -> None:
    shares = ((np.arange(40),) * 2,) * 3
    first, second = (lay(ArrivalRule("blurry", early=0.5), shares, ((0,), (1, 2)), seed=seed) for seed in (0, 1))
    drawn = [rows(when, task, client, 1) for when in (first, second) for task in (1, 2) for client in (0, 1)]
    assert len({tuple(part) for part in drawn}) == 8
    assert list(range(20)) not in drawn


def test_blurry_names_the_next_stages_tasks_only_where_the_client_has_early_rows_of_them() -> None:
    dealt = (np.arange(3), np.arange(3, 6)), (np.arange(1), np.arange(1, 6)), (np.arange(4), np.arange(4, 4))
    when = lay(ArrivalRule("blurry", early=0.5), dealt, ((0,), (1, 2)))
    assert [when.tasks(client, 1, 1) for client in (0, 1)] == [(0, 2), (0, 1)]
    assert [when.tasks(client, 2, 1) for client in (0, 1)] == [(1, 2), (1, 2)]
    assert [len(rows(when, task, client, 1)) for client in (0, 1) for task in (1, 2)] == [0, 2, 2, 0]


def test_blurry_announces_a_task_that_goes_on_only_once() -> None:
    when = lay(ArrivalRule("blurry", early=0.5), stages=((0, 1), (0, 2)))
    assert [when.tasks(0, stage, 1) for stage in (1, 2)] == [(0, 1, 2), (0, 2)]
    assert rows(when, 0, 0, 1) == SHARES[0][0].tolist()


blurry_rule = st.builds(
    ArrivalRule,
    st.just("blurry"),
    st.sampled_from((0.1, 0.29, 0.5, 0.9)),
    st.sampled_from(("same", "fresh")),
)
streams = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True).map(tuple), min_size=1, max_size=5)


@settings(max_examples=80, deadline=None)
@given(blurry_rule, streams, st.integers(1, 4), st.integers(0, 40), st.integers(0, 2**31))
def test_over_all_stages_every_row_of_a_task_that_comes_is_there(
    rule: ArrivalRule, stages: list[tuple[int, ...]], clients: int, n: int, seed: int
) -> None:
    shares = deal(4, clients, n)
    when = lay(rule, shares, stages, 1, seed)
    for task in {task for stage in stages for task in stage}:
        occurs = [number for number, stage in enumerate(stages, 1) if task in stage]
        for client in range(clients):
            found = [rows(when, task, client, stage) for stage in range(1, len(stages) + 1)]
            assert {row for part in found for row in part} == set(shares[task][client].tolist())
            for stage, part in enumerate(found, 1):
                named = task in when.tasks(client, stage, 1)
                assert named == (stage in occurs or bool(part))
                assert stage in occurs or stage + 1 in occurs or not part
            if rule.repeats == "fresh":
                assert sum(map(len, found)) == len(shares[task][client])  # nothing comes twice


@pytest.mark.parametrize("n", [0, 1, 2, 3, 10, 31])
@pytest.mark.parametrize("kind", ["stages", "asynchronous"])
def test_a_task_that_recurs_brings_a_fresh_equal_part_each_time(kind: str, n: int) -> None:
    share, stages = np.arange(5, 5 + n), ((0,), (1,), (0, 1), (0,))
    when = lay(ArrivalRule(kind, repeats="fresh"), [(share,), (np.arange(9),)], stages)
    parts = [rows(when, 0, 0, stage) for stage in (1, 3, 4)]
    assert sorted(row for part in parts for row in part) == share.tolist()
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    assert rows(when, 0, 0, 2) == []
    assert when.tasks(0, 2, 1) == (1,)
    other = lay(ArrivalRule(kind, repeats="fresh"), [(share,), (np.arange(9),)], stages, seed=1)
    assert n < 10 or parts != [rows(other, 0, 0, stage) for stage in (1, 3, 4)]


def test_a_task_that_recurs_brings_the_same_rows_where_the_rule_says_so() -> None:
    when = lay(ArrivalRule(repeats="same"))
    assert rows(when, 0, 1, 1) == rows(when, 0, 1, 3) == SHARES[0][1].tolist()


def test_blurry_and_fresh_by_hand() -> None:
    when = lay(ArrivalRule("blurry", early=0.4, repeats="fresh"), [(np.arange(21),)] * 2, ((0,), (1,), (0,)))
    first, early, late = (rows(when, 0, 0, stage) for stage in (1, 2, 3))
    assert [len(part) for part in (first, early, late)] == [11, 4, 6]
    assert sorted(first + early + late) == list(range(21))
    assert when.tasks(0, 2, 1) == (1, 0)


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_every_client_enters_a_stage_within_the_lag_and_stays_in_the_former_one_until_then(lag: int) -> None:
    clients, stages, rounds = 200, 3, 4
    own = own_stages(ArrivalRule("asynchronous", lag=lag), clients, stages, rounds)
    assert (own[:, :rounds] == 1).all()  # the first stage begins for all at once
    late = np.array(
        [[(mine[begin : begin + rounds] < stage).sum() for mine in own] for stage, begin in ((2, 4), (3, 8))]
    )
    assert set(late.ravel().tolist()) == set(range(lag + 1))
    assert (np.diff(own, axis=1) >= 0).all()
    assert (np.diff(own, axis=1) <= 1).all()
    if lag:
        assert np.abs(np.corrcoef(late)[0, 1]) < 0.3  # a client that was late once need not be so again
        assert (own != own_stages(ArrivalRule("asynchronous", lag=lag), clients, stages, rounds, seed=1)).any()


def test_a_client_behind_has_its_own_stages_rows() -> None:
    shares, stages = deal(3, 12, 60), ((0,), (1,), (2,))
    when = lay(ArrivalRule("asynchronous", early=0.4, lag=1), shares, stages)
    behind = [client for client in range(12) if when.tasks(client, 2, 1)[0] == 0]
    assert 0 < len(behind) < 12
    for client in behind:
        assert when.tasks(client, 2, 1) == when.tasks(client, 1, 2) == (0, 1)
        assert rows(when, 0, client, 2) == rows(when, 0, client, 1)
        assert rows(when, 1, client, 2) == rows(when, 1, client, 1)
        assert rows(when, 1, client, 2) != rows(when, 1, client, 2, 2)
        assert rows(when, 2, client, 2) == []


def test_without_lag_and_change_of_clients_a_clock_is_the_servers() -> None:
    own, servers = lay(ArrivalRule("asynchronous")), lay(ArrivalRule())
    blurry = [lay(ArrivalRule(kind, early=0.5)) for kind in ("asynchronous", "blurry")]
    for one, other in ((own, servers), blurry):
        for client, stage, round_ in np.ndindex(3, 3, 2):
            at = (client, stage + 1, round_ + 1)
            assert one.tasks(*at) == other.tasks(*at)
            assert [rows(one, t, *at) for t in one.tasks(*at)] == [rows(other, t, *at) for t in other.tasks(*at)]


@pytest.mark.parametrize(("late", "leave"), [(0.3, 0.0), (0.0, 0.25), (0.3, 0.25), (0.5, 0.5)])
@pytest.mark.parametrize(("stages", "rounds"), [(2, 2), (3, 4), (1, 3)])
def test_late_clients_join_in_the_first_half_and_leavers_go_in_the_second(
    late: float, leave: float, stages: int, rounds: int
) -> None:
    clients, total = 40, stages * rounds
    here = own_stages(ArrivalRule("asynchronous", late=late, leave=leave), clients, stages, rounds) > 0
    assert (~here[:, 0]).sum() == round(late * clients)
    assert (~here[:, -1]).sum() == round(leave * clients)
    middle = max(2, total // 2)
    assert here[:, middle - 1].all()  # everybody is there at least once
    spans = np.diff(here.astype(int), axis=1)
    assert (spans[:, : middle - 1] >= 0).all()  # nobody goes before the middle
    assert (spans[:, middle - 1 :] <= 0).all()  # and nobody comes after it
    if total > 6 and late and leave:
        assert len(set(here.argmax(axis=1).tolist())) > 2  # not all at once
        assert len(set(here[:, ::-1].argmax(axis=1).tolist())) > 2


def test_who_joins_late_begins_with_the_stage_of_that_round() -> None:
    rule = ArrivalRule("asynchronous", lag=2, late=0.9)
    own = own_stages(rule, 200, 4, 3)
    first = (own > 0).argmax(axis=1)
    joined = first > 0
    assert joined.sum() == 180
    assert (own[joined, first[joined]] == first[joined] // 3 + 1).all()


@pytest.mark.parametrize(
    ("rule", "rounds", "message"),
    [
        (ArrivalRule("asynchronous", lag=2), 2, r"lag: must be below federation.rounds_per_stage \(2\), got 2"),
        (ArrivalRule("asynchronous", lag=9), 2, r"lag: must be below federation.rounds_per_stage \(2\), got 9"),
        (ArrivalRule("asynchronous", late=0.9), 2, "late and leave: no client is present in round 1 of the run"),
        (ArrivalRule("asynchronous", leave=0.9), 2, "late and leave: no client is present in round 6 of the run"),
        (ArrivalRule("asynchronous", late=0.5, leave=0.9), 1, "late and leave: no client is present in round 3 of the"),
    ],
)
def test_a_clock_that_leaves_nobody_is_refused(rule: ArrivalRule, rounds: int, message: str) -> None:
    with pytest.raises(BadInput, match=f"^{message}"):
        lay(rule, rounds=rounds)


@pytest.mark.parametrize("key", ["late", "leave"])
def test_a_run_too_short_to_join_or_leave_is_refused(key: str) -> None:
    rule = ArrivalRule("asynchronous", **{key: 0.4})  # type: ignore[arg-type]
    for rounds in (1, 2):
        with pytest.raises(BadInput, match=f"late and leave: must be 0 .* fewer than 3 rounds, got a run of {rounds}"):
            lay(rule, stages=((0,),), rounds=rounds)
    assert isinstance(lay(rule, stages=((0,),), rounds=3), Clocked)


@pytest.mark.parametrize(
    "rule",
    [
        ArrivalRule("blurry", early=0.3),
        ArrivalRule("blurry", early=0.3, repeats="fresh"),
        ArrivalRule("asynchronous", early=0.3, repeats="fresh", lag=1, late=0.4, leave=0.4),
    ],
)
def test_answers_do_not_depend_on_what_was_asked_before(rule: ArrivalRule) -> None:
    asked = [(client, stage, round_) for client in range(3) for stage in (1, 2, 3) for round_ in (1, 2)]

    def told(order: Sequence[tuple[int, int, int]]) -> dict[tuple[int, int, int], Any]:
        when = lay(rule)
        return {at: (when.tasks(*at), [rows(when, task, *at) for task in range(4)]) for at in order}

    assert told(asked) == told(asked[::-1])


def test_ten_thousand_clients_are_asked_who_is_there() -> None:
    shares = deal(3, 10_000, 30_000)
    for rule in (
        ArrivalRule(),
        ArrivalRule("blurry", early=0.5),
        ArrivalRule("asynchronous", early=0.5, lag=1, late=0.2, leave=0.2),
    ):
        when = lay(rule, shares, ((0,), (1,), (2,)))
        present = [sum(bool(when.tasks(c, stage, 1)) for c in range(10_000)) for stage in (1, 3)]
        assert present[0] == (8_000 if rule.late else 10_000)
        assert 8_000 <= present[1] <= 10_000


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "blury", "early": 0.1}, "kind: unknown 'blury'; did you mean 'blurry'"),
        ({"repeats": "frsh"}, "repeats: unknown 'frsh'; did you mean 'fresh'"),
        ({"kind": "blurry"}, "early: must be above 0 with kind blurry, got 0"),
        ({"kind": "blurry", "early": 1.0}, "early: must be at least 0 and below 1, got 1"),
        ({"kind": "blurry", "early": -0.1}, "early: must be at least 0 and below 1"),
        ({"kind": "blurry", "early": float("nan")}, "early: must be at least 0 and below 1"),
        ({"early": 0.1}, "early: must be 0 with this kind, got 0.1"),
        ({"kind": "trace", "file": "a", "early": 0.1}, "early: must be 0 with this kind"),
        ({"kind": "asynchronous", "lag": -1}, "lag: must be at least 0, got -1"),
        ({"kind": "asynchronous", "late": 1.0}, "late: must be at least 0 and below 1"),
        ({"kind": "asynchronous", "leave": float("inf")}, "leave: must be at least 0 and below 1"),
        ({"lag": 1}, "lag: must be 0 unless kind is asynchronous, got 1"),
        ({"kind": "blurry", "early": 0.1, "late": 0.1}, "late: must be 0 unless kind is asynchronous"),
        ({"kind": "trace", "file": "a", "leave": 0.1}, "leave: must be 0 unless kind is asynchronous"),
        ({"kind": "trace"}, "file: must be there with kind: trace, and only then, got ''"),
        ({"file": "a.json"}, "file: must be there with kind: trace, and only then, got 'a.json'"),
    ],
)
def test_a_rule_out_of_range_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=f"^{message}"):
        ArrivalRule(**wrong)


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        (ArrivalRule(), {"kind": "stages"}),
        (ArrivalRule(repeats="fresh"), {"kind": "stages", "repeats": "fresh"}),
        (ArrivalRule("blurry", early=0.2), {"kind": "blurry", "early": 0.2}),
        (ArrivalRule("asynchronous", lag=2, leave=0.1), {"kind": "asynchronous", "lag": 2, "leave": 0.1}),
    ],
)
def test_the_hash_is_told_only_keys_that_differ_from_their_default(rule: ArrivalRule, told: dict[str, Any]) -> None:
    assert describe(rule) == told


def test_the_hash_is_told_a_traces_content_and_not_its_path(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("[]")
    sha = hashlib.sha256(b"[]").hexdigest()
    assert describe(ArrivalRule("trace", file="a.json"), tmp_path) == {"kind": "trace", "file": sha}
    assert describe(ArrivalRule("trace", file="b.json"), tmp_path) == {"kind": "trace", "file": sha}
