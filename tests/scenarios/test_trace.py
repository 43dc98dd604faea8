"""Traces: three formats, one meaning; every mistake names file, record and rule."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedstrata.core.errors import BadInput
from fedstrata.scenarios.arrival import ArrivalRule, Timeline, timeline
from fedstrata.scenarios.trace import Trace, read_trace

NAMES = ("names", "charts", "icons")
CLIENTS, ROUNDS = 3, 6  # 2 stages of 3 rounds
RECORDS: list[dict[str, Any]] = [
    {"client": 0, "round": 1, "tasks": ["names"]},
    {"client": 0, "round": 3, "tasks": []},
    {"client": 0, "round": 5, "tasks": ["icons", "names"]},
    {"client": 2, "round": 2, "tasks": ["charts"]},
]
HELD = [  # [round, client]
    [(0,), (), ()],
    [(0,), (), (1,)],
    [(), (), (1,)],
    [(), (), (1,)],
    [(0, 2), (), (1,)],
    [(0, 2), (), (1,)],
]


def write(folder: Path, records: Sequence[Any], kind: str = "json") -> Path:
    path = folder / f"trace.{kind}"
    if kind == "json":
        path.write_text(json.dumps(list(records)))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["client", "round", "tasks"])
            writer.writeheader()
            writer.writerows({**record, "tasks": "+".join(record["tasks"] or ())} for record in records)
    return path


def read(path: Path) -> Trace:
    return read_trace(path, CLIENTS, ROUNDS, NAMES)


def held(trace: Trace) -> list[list[tuple[int, ...]]]:
    return [[trace.at(client, number) for client in range(CLIENTS)] for number in range(1, ROUNDS + 1)]


def refused(path: Path) -> str:
    with pytest.raises(BadInput) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
@pytest.mark.parametrize("backwards", [False, True])
def test_changes_take_effect_from_their_round_in_every_format_and_order(
    tmp_path: Path, kind: str, backwards: bool
) -> None:
    assert held(read(write(tmp_path, RECORDS[::-1] if backwards else RECORDS, kind))) == HELD


def test_null_is_absence(tmp_path: Path) -> None:
    told = [record if record["tasks"] else record | {"tasks": None} for record in RECORDS]
    assert held(read(write(tmp_path, told))) == HELD


def test_a_csv_file_may_have_a_mark_spaces_and_another_order_of_columns(tmp_path: Path) -> None:
    path = tmp_path / "trace.CSV"
    path.write_bytes(
        b'\xef\xbb\xbftasks,round,client\r\nnames, 1 ,0\r\n,3,0\r\n\r\n" icons + names ",5,0\r\n"charts",2,2'
    )
    assert held(read(path)) == HELD


changes = st.dictionaries(
    st.tuples(st.integers(1, CLIENTS - 1), st.integers(1, ROUNDS)), st.sets(st.sampled_from(NAMES)), max_size=12
)


@settings(max_examples=40, deadline=None)
@given(changes, st.randoms(use_true_random=False))
def test_the_last_change_so_far_counts(tmp_path_factory: pytest.TempPathFactory, told: Any, random: Any) -> None:
    folder = tmp_path_factory.mktemp("trace")
    records = [{"client": client, "round": number, "tasks": sorted(names)} for (client, number), names in told.items()]
    records.append({"client": 0, "round": 1, "tasks": ["names"]})  # so that no round is empty
    random.shuffle(records)
    found = [held(read(write(folder, records, kind))) for kind in ("json", "jsonl", "csv")]
    assert found[0] == found[1] == found[2]
    for client in range(1, CLIENTS):
        names: set[str] = set()
        for number in range(1, ROUNDS + 1):
            names = told.get((client, number), names)
            assert found[0][number - 1][client] == tuple(sorted(NAMES.index(name) for name in names))


def changed(number: int, **values: Any) -> list[Any]:
    return [record | values if place == number else record for place, record in enumerate(RECORDS, 1)]


LAYOUT = "must be a mapping with client, round and tasks, got "
CLIENT, ROUND = (
    "client must be a whole number between 0 and 2, got ",
    "round must be a whole number between 1 and 6, got ",
)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (changed(2, client=3), f"record 2: {CLIENT}3"),
        (changed(2, client=-1), f"record 2: {CLIENT}-1"),
        (changed(2, client=True), f"record 2: {CLIENT}True"),
        (changed(2, client=0.0), f"record 2: {CLIENT}0.0"),
        (changed(2, client="0"), f"record 2: {CLIENT}'0'"),
        (changed(2, client=None), f"record 2: {CLIENT}None"),
        (changed(2, client=10**30), f"record 2: {CLIENT}1000000"),
        (changed(3, round=0), f"record 3: {ROUND}0"),
        (changed(3, round=7), f"record 3: {ROUND}7"),
        (changed(3, round="5"), f"record 3: {ROUND}'5'"),
        (changed(3, round=[5]), f"record 3: {ROUND}a list of 1"),
        (changed(4, tasks=["chart"]), "record 4: tasks: unknown 'chart'; did you mean 'charts'? known: charts, icons"),
        (changed(4, tasks=["\ud800"]), "record 4: tasks must be "),
        (changed(4, tasks="charts"), "record 4: tasks must be a list of task names, got 'charts'"),
        (changed(4, tasks=[1]), "record 4: tasks must be a list of task names, got a list of 1"),
        (changed(4, tasks=""), "record 4: tasks must be a list of task names, got ''"),
        (changed(4, tasks=False), "record 4: tasks must be a list of task names, got False"),
        (changed(4, tasks={}), "record 4: tasks must be a list of task names, got a dict of 0"),
        (changed(2, round=1), "record 2: client 0 must have one record for round 1, got a second one"),
        (changed(1, stage=1), f"record 1: {LAYOUT}"),
        ([*RECORDS, {"client": 1, "round": 1}], f"record 5: {LAYOUT}"),
        ([*RECORDS, [1, 1, []]], f"record 5: {LAYOUT}"),
        ([*RECORDS, None], f"record 5: {LAYOUT}"),
        (RECORDS[3:], "some client must be present in every round, none is in round 1"),
        (RECORDS[:3], "some client must be present in every round, none is in round 3"),
        ([], "some client must be present in every round, none is in round 1"),
    ],
)
def test_a_wrong_record_is_refused(tmp_path: Path, records: list[Any], message: str) -> None:
    assert refused(write(tmp_path, records)).startswith(message)
    if records:
        assert refused(write(tmp_path, records, "jsonl")).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have the columns client, round, tasks, got ''"),
        ("client,round\n0,1\n", "must have the columns client, round, tasks, got 'client,round'"),
        ("client,round,task\n0,1,names\n", "must have the columns client, round, tasks"),
        ("client,round,tasks,stage\n0,1,names,1\n", "must have the columns client, round, tasks"),
        ("0,1,names\n", "must have the columns client, round, tasks, got '0,1,names'"),
        ("client,round,tasks\n0,1,names\n0,2,names,icons\n", "record 2: must have 3 cells, got more"),
        ("client,round,tasks\n0,1,names\n0\n", "record 2: must have 3 cells, got fewer"),
        ("client,round,tasks\n0,1,names\n0,2\n", "record 2: must have 3 cells, got fewer"),
        ("client,round,tasks\n0,1,names\n,2,icons\n", f"record 2: {CLIENT}''"),
        ("client,round,tasks\n0,1,names\n0,2.0,icons\n", f"record 2: {ROUND}'2.0'"),
        ("client,round,tasks\n0,1,names\n-1,2,icons\n", f"record 2: {CLIENT}'-1'"),
        (f"client,round,tasks\n0,1,names\n0,{'9' * 5000},icons\n", f"record 2: {ROUND}'999"),
        ("client,round,tasks\n0,1,names\n\0001,2,icons\n", f"record 2: {CLIENT}"),
        ("client,round,tasks\n0,1,nams\n", "record 1: tasks: unknown 'nams'; did you mean 'names'?"),
        ("client,round,tasks\n0,1,names+\n", "record 1: tasks: unknown ''"),
        ("client,round,tasks\n0,1,names\n0,1,\n", "record 2: client 0 must have one record for round 1"),
        ('client,round,tasks\n0,1,"names\n', "not a readable CSV file: "),
        ('client,round,tasks\n0,1,"na"mes\n', "not a readable CSV file: "),
    ],
)
def test_a_wrong_csv_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(text.encode())
    assert refused(path).startswith(message)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("trace.json", b'[{"client": 0, "round": 1', "record 1: must be JSON: "),
        ("trace.json", b'{"client": 0}', "must hold a JSON array of records"),
        ("trace.json", b"\0", "must hold a JSON array of records"),
        ("trace.jsonl", b"", "must hold a JSON array of records, got an empty file"),
        ("trace.jsonl", b'{"client": 0, "client": 1}', "record 1: must not have a key twice, got 'client' again"),
        ("trace.csv", b"client,round,tasks\n\xff,1,names\n", "not a readable CSV file: "),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    assert refused(tmp_path / name).startswith(message)


@pytest.mark.parametrize("name", ["gone.json", "gone.csv", ".", "a\0b.json", "a\0b.csv"])
def test_a_trace_that_is_not_there_is_refused(tmp_path: Path, name: str) -> None:
    assert refused(tmp_path / name)


SHARES = (  # [task][client]
    (np.arange(7), np.arange(7, 9), np.zeros(0, np.int64)),
    (np.arange(2), np.arange(2, 4), np.arange(4, 8)),
    (np.arange(5), np.zeros(0, np.int64), np.zeros(0, np.int64)),
)
SPELLS: list[dict[str, Any]] = [
    {"client": 0, "round": 1, "tasks": ["names"]},
    {"client": 0, "round": 2, "tasks": ["names", "icons"]},  # the same spell of names goes on
    {"client": 0, "round": 3, "tasks": ["icons"]},
    {"client": 0, "round": 4, "tasks": ["names"]},
    {"client": 0, "round": 5, "tasks": []},
    {"client": 0, "round": 6, "tasks": ["names"]},
    {"client": 2, "round": 1, "tasks": ["charts", "names"]},
]


def traced(folder: Path, repeats: str) -> Timeline:
    rule = ArrivalRule("trace", repeats=repeats, file=write(folder, SPELLS).name)
    return timeline(rule, ((0,), (1, 2)), SHARES, 3, 5, NAMES, folder)


def rows(when: Timeline, task: int, client: int) -> list[list[int]]:
    return [when.rows(task, client, stage, round_).tolist() for stage in (1, 2) for round_ in (1, 2, 3)]


def test_a_trace_counts_rounds_through_all_stages(tmp_path: Path) -> None:
    when = traced(tmp_path, "same")
    told = [when.tasks(0, stage, round_) for stage in (1, 2) for round_ in (1, 2, 3)]
    assert told == [(0,), (0, 2), (2,), (0,), (), (0,)]
    assert [when.tasks(1, 2, round_) for round_ in (1, 2, 3)] == [()] * 3


def test_same_rows_come_with_every_spell_and_none_between(tmp_path: Path) -> None:
    when, all_ = traced(tmp_path, "same"), list(range(7))
    assert rows(when, 0, 0) == [all_, all_, [], all_, [], all_]
    assert rows(when, 2, 0) == [[], list(range(5)), list(range(5)), [], [], []]
    assert rows(when, 0, 1) == [[]] * 6
    assert rows(when, 0, 2) == [[]] * 6  # present, but it holds none of them


def test_fresh_rows_come_with_every_spell_and_stay_for_it(tmp_path: Path) -> None:
    found = rows(traced(tmp_path, "fresh"), 0, 0)
    assert found[0] == found[1]
    parts = [found[0], found[3], found[5]]
    assert [len(part) for part in parts] == [3, 2, 2]
    assert sorted(row for part in parts for row in part) == list(range(7))
    assert all(part == sorted(part) for part in parts)
    assert (found[2], found[4]) == ([], [])
    assert rows(traced(tmp_path, "fresh"), 2, 0)[1] == list(range(5))  # one spell: all of them
    assert rows(traced(tmp_path, "fresh"), 0, 0) == found
