"""A scenario's questions, on one made by hand, and its hash in other processes."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedstrata.core.config import ScenarioSection
from fedstrata.core.errors import BadInput
from fedstrata.scenarios import build
from fedstrata.scenarios.arrival import ArrivalRule, timeline
from fedstrata.scenarios.dealing import Indices
from fedstrata.scenarios.images import ImageFile, ZipMember
from fedstrata.scenarios.stream import Example, Pixels, Scenario, Task, digest

SHARES = (([0, 1, 4], [2, 3]), ([1], [0, 2, 3]), ([0], [1, 2]))
STAGES = ((0,), (1, 2), (0, 1, 2))


def task(name: str, rows: int) -> Task:
    examples = tuple(Example(f"{name}{row}", "What?", f"{row}") for row in range(rows))
    return Task(name, train=examples, test=examples[:1])


def arrays(shares: Any) -> tuple[tuple[Indices, ...], ...]:
    return tuple(tuple(np.array(rows, dtype=np.int64) for rows in hands) for hands in shares)


def hand(shares: Any = SHARES, rule: ArrivalRule | None = None, folder: Path | None = None) -> Scenario:
    dealt = arrays(shares)
    return Scenario(
        name="hand",
        tasks=(task("a", 5), task("b", 4), task("c", 3)),
        stages=STAGES,
        assign=None,
        shares=dealt,
        timeline=timeline(rule or ArrivalRule(), STAGES, dealt, 2, 0, ("a", "b", "c"), folder or Path()),
        vocabularies=(frozenset("01234"), frozenset("0123"), frozenset("012")),
        beta=1.0,
        seed=0,
        hash="0" * 64,
    )


@pytest.fixture
def scenario() -> Scenario:
    return hand()


def test_homogeneous_participants_train_the_stage(scenario: Scenario) -> None:
    assert [scenario.tasks_of(2, 1, position, position % 2) for position in range(3)] == [(1, 2)] * 3
    assert scenario.stage_names == ("1 a", "2 b+c", "3 a+2 more")
    assert scenario.client_count == 2
    assert [scenario.present(stage, 2) for stage in (1, 2, 3)] == [[0, 1]] * 3


def test_heterogeneous_participants_train_the_tasks_of_their_position(scenario: Scenario) -> None:
    assign = (((0,), (0,)), ((2,), (1,), (1, 2)), ((2,), (0,), (1,)))
    scenario = dataclasses.replace(scenario, assign=assign)
    told = [scenario.tasks_of(2, 1, position, 0) for position in range(7)]
    assert told == [(2,), (1,), (1, 2), (2,), (1,), (1, 2), (2,)]
    assert [scenario.tasks_of(3, 2, 1, client) for client in (0, 1)] == [(0,), (0,)]


def test_a_share_is_by_task_then_in_the_tasks_order(scenario: Scenario) -> None:
    for asked in ((0, 2), (2, 0), (2, 0, 2)):
        for when in ((), (3, 1)):
            share = scenario.share(asked, 0, *when)
            assert share == [(0, 0), (0, 1), (0, 4), (2, 0)]
            assert all(type(row) is int for _, row in share)
            assert scenario.share_size(asked, 0, *when) == 4
            assert [(t, rows.tolist()) for t, rows in scenario.holding(asked, 0, *when)] == [(0, [0, 1, 4]), (2, [0])]
    assert [row.id for row in scenario.read(scenario.share((0, 2), 0))] == ["a0", "a1", "a4", "c0"]
    assert scenario.share((), 1) == []


def traced(folder: Path, records: list[dict[str, Any]]) -> Scenario:
    (folder / "trace.json").write_text(json.dumps(records))
    return hand(rule=ArrivalRule("trace", file="trace.json"), folder=folder)


def test_who_is_absent_has_no_tasks_no_rows_and_is_not_drawn(tmp_path: Path) -> None:
    told = [
        {"client": 0, "round": 1, "tasks": ["a"]},
        {"client": 1, "round": 3, "tasks": ["c", "a"]},
        {"client": 0, "round": 4, "tasks": []},
    ]
    scenario = traced(tmp_path, told)
    times = [(stage, round_) for stage in (1, 2, 3) for round_ in (1, 2)]
    assert [scenario.present(*at) for at in times] == [[0], [0], [0, 1], [1], [1], [1]]
    assert [scenario.tasks_of(*at, 0, 0) for at in times] == [(0,), (0,), (0,), (), (), ()]
    assert [scenario.share_size((0, 1, 2), 1, *at) for at in times] == [0, 0, 4, 4, 4, 4]
    assert scenario.share((0, 1), 1, 2, 1) == [(0, 2), (0, 3)]  # it is there, but not with task b
    assert scenario.share_size((0, 1, 2), 1) == 7  # all that it ever has


def test_who_has_nothing_to_train_is_not_drawn_unless_its_place_decides() -> None:
    scenario = hand((([0, 1, 4], [2, 3]), ([1], []), ([0, 2], [])))
    assert [scenario.present(stage, 1) for stage in (1, 2, 3)] == [[0, 1], [0], [0, 1]]
    assign = (((0,),), ((1,), (2,)), ((0,), (1,), (2,)))
    assert dataclasses.replace(scenario, assign=assign).present(2, 1) == [0, 1]


def test_blurry_rows_are_those_of_the_share_at_their_time() -> None:
    shares = (([0, 1, 4], [2, 3]), ([0, 1, 2, 3], []), ([0, 2], [1]))
    scenario = hand(shares, ArrivalRule("blurry", early=0.5))
    assert [scenario.tasks_of(1, 1, 0, client) for client in (0, 1)] == [(0, 1, 2), (0,)]
    before, then = (scenario.share((1, 2), 0, stage, 2) for stage in (1, 2))
    assert (len(before), len(then)) == (3, 3)
    assert sorted(before + then) == scenario.share((1, 2), 0) == [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 2)]
    assert {example.id for example in scenario.read(before)} < {"b0", "b1", "b2", "b3", "c0", "c2"}


def test_seen_counts_whole_stages(scenario: Scenario) -> None:
    assert [scenario.seen(done) for done in range(4)] == [
        (False, False, False),
        (True, False, False),
        (True, True, True),
        (True, True, True),
    ]


def test_the_data_key_changes_exactly_with_the_clients_data(scenario: Scenario) -> None:
    key = scenario.data_key((0, 1), 0)
    assert len(key) == 16
    assert key == scenario.data_key((1, 0), 0) == scenario.data_key((0, 1), 0, 3, 2)
    assert key != scenario.data_key((0,), 0)
    assert key != scenario.data_key((0, 1), 1)
    others = dataclasses.replace(scenario, shares=arrays((([0, 1, 4], [2]), ([1], [0]), ([], []))), hash="1" * 64)
    assert key == others.data_key((0, 1), 0)
    assert scenario.data_key((0, 1), 1) != others.data_key((0, 1), 1)
    changed = dataclasses.replace(scenario.tasks[0], train=(*task("a", 4).train, Example("a4", "What?", "new")))
    assert key != dataclasses.replace(scenario, tasks=(changed, *scenario.tasks[1:])).data_key((0, 1), 0)


@pytest.mark.parametrize(
    ("rule", "keys"),
    [
        (ArrivalRule(), [0, 0, 0]),
        (ArrivalRule(repeats="fresh"), [0, 1, 2]),
        (ArrivalRule("blurry", early=0.1), [1, 1, 1]),  # a tenth of three rows is no row: as if there were none
    ],
)
def test_the_data_key_follows_the_rows_and_not_the_stage(rule: ArrivalRule, keys: list[int]) -> None:
    scenario = hand(rule=rule)
    first, again, none = (scenario.data_key((0,), 0, *at) for at in ((1, 1), (3, 1), (2, 1)))
    assert scenario.data_key((0,), 0, 1, 2) == first
    same = rule.repeats == "same"
    assert (first == again) == same
    assert (first == scenario.data_key((0,), 0)) == same
    assert (none == first) == (rule == ArrivalRule())


def test_a_digest_sees_every_field_and_no_folder() -> None:
    example = Example("a", "b", "c", ImageFile("/here", "1.png"))
    same = [ImageFile("/there", "1.png"), ZipMember("/x.zip", "1.png", "./1.png")]
    assert {digest([dataclasses.replace(example, image=image)]) for image in same} == {digest([example])}
    pixels = [Pixels(np.full((2, 2, 3), value, np.uint8)) for value in (0, 1)]
    others = [Example("ab", "", "c"), Example("a", "bc", ""), Example("a", "b", "c"), Example("a", "b", "c", pixels[0])]
    others += [Example("a", "b", "c", pixels[1]), Example("a", "b", "c", ImageFile("/here", "2.png")), example]
    assert len({digest([other]) for other in others}) == len(others)


def test_a_scenario_travels_and_keeps_its_data() -> None:
    scenario = build(ScenarioSection("fcit-mini-short"), 4, 3)
    copy = pickle.loads(pickle.dumps(scenario))
    assert (copy.hash, told(copy)) == (scenario.hash, told(scenario))
    assert copy.data_key((0,), 1, 1, 1) == scenario.data_key((0,), 1, 1, 1)


def told(scenario: Scenario) -> list[list[list[int]]]:
    return [[rows.tolist() for rows in shares] for shares in scenario.shares]


def write(folder: Path, arrival: dict[str, Any], partition: dict[str, Any], name: str = "mine.yaml") -> ScenarioSection:
    """Two generated tasks in three stages."""
    drawn = {"generate": "fcit-mini/charts", "train": 40, "val": 4, "test": 4}
    tasks = {"charts": drawn, "icons": {**drawn, "generate": "fcit-mini/icons"}}
    tree = {"tasks": tasks, "stages": [["charts"], ["icons"], ["charts"]], "partition": partition, "arrival": arrival}
    (folder / name).write_text(yaml.safe_dump(tree, sort_keys=False))
    return ScenarioSection(str(folder / name))


def write_records(folder: Path) -> ScenarioSection:
    """Tasks of a file, dealt by label, blurred."""
    letters = [{"q": f"Which letter is number {n}?", "a": "abc"[n % 3], "city": f"c{n % 5}"} for n in range(60)]
    for name, rows in (("train", letters), ("test", letters[:3])):
        told = [row | {"q": f"{name}: {row['q']}"} for row in rows]
        (folder / f"{name}.json").write_text(json.dumps(told))
    task = {"train": "train.json", "test": "test.json", "format": "fields", "fields": {"question": "q", "answer": "a"}}
    tree = {
        "tasks": {"letters": task, "again": {**task, "suffix": "One letter."}},
        "stages": [["letters"], ["again"]],
        "partition": {"kind": "dirichlet-label", "beta": 0.7},
        "arrival": {"kind": "blurry", "early": 0.3},
    }
    (folder / "letters.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return ScenarioSection(str(folder / "letters.yaml"))


def test_hash_partition_and_arrival_are_the_same_in_every_process(tmp_path: Path) -> None:
    names = ["fcit-mini-short", write_records(tmp_path).name]
    code = (
        "import sys; from fedstrata.core.config import ScenarioSection; from fedstrata.scenarios import build\n"
        "for name in sys.argv[1:]:\n"
        "    s = build(ScenarioSection(name), 4, 7)\n"
        "    shares = [[rows.tolist() for rows in shares] for shares in s.shares]\n"
        "    print(s.hash, shares, [s.share((0, 1), c, 1, 1) for c in range(4)], s.data_key((0, 1), 2, 2, 1))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code, *names],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("0", "4242")
    }
    expected = ""
    for name in names:
        s = build(ScenarioSection(name), 4, 7)
        early = [s.share((0, 1), client, 1, 1) for client in range(4)]
        expected += f"{s.hash} {told(s)} {early} {s.data_key((0, 1), 2, 2, 1)}\n"
    assert found == {expected}


def test_a_file_scenario_is_dealt_by_label_and_blurred(tmp_path: Path) -> None:
    scenario = build(write_records(tmp_path), 4, 7)
    assert (scenario.beta, scenario.vocabulary(0)) == (0.7, {"a", "b", "c"})
    for client in range(4):
        early, then = (scenario.share((1,), client, stage, 1) for stage in (1, 2))
        assert sorted(early + then) == scenario.share((1,), client)
        assert scenario.tasks_of(1, 1, 0, client) == ((0, 1) if early else (0,))


IID = {"kind": "iid"}


def test_arrival_and_its_rounds_are_in_the_hash(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"client": 0, "round": 1, "tasks": ["charts"]}]')
    (tmp_path / "b.json").write_text('[{"client": 1, "round": 1, "tasks": ["charts"]}]')
    rules: list[dict[str, Any]] = [
        {"kind": "stages"},
        {"kind": "stages", "repeats": "fresh"},
        {"kind": "blurry", "early": 0.2},
        {"kind": "blurry", "early": 0.3},
        {"kind": "asynchronous"},
        {"kind": "asynchronous", "lag": 1},
        {"kind": "trace", "file": "a.json"},
        {"kind": "trace", "file": "b.json"},
    ]
    hashes = [build(write(tmp_path, rule, IID), 3, 0, rounds=2).hash for rule in rules]
    assert len(set(hashes)) == len(rules)
    (tmp_path / "copy.json").write_bytes((tmp_path / "a.json").read_bytes())
    assert build(write(tmp_path, {"kind": "trace", "file": "copy.json"}, IID), 3, 0, rounds=2).hash == hashes[6]
    assert build(write(tmp_path, rules[5], IID), 3, 0, rounds=3).hash != hashes[5]
    assert build(write(tmp_path, {}, IID), 3, 0, rounds=3).hash == hashes[0]
    assert build(write(tmp_path, {"kind": "stages", "early": 0.0}, IID), 3, 0).hash == hashes[0]


def test_a_saved_partition_gives_the_same_shares(tmp_path: Path) -> None:
    first = build(write(tmp_path, {}, {"kind": "dirichlet", "beta": 0.8}), 3, 5)
    first.save_partition(tmp_path / "who.json")
    again = build(write(tmp_path, {}, {"kind": "file", "file": "who.json"}), 3, 5)
    assert told(again) == told(first)
    assert again.beta is None
    with pytest.raises(BadInput, match=r"mine.yaml: tasks.charts: .*who.json: tasks.charts: was saved for other train"):
        build(ScenarioSection(str(tmp_path / "mine.yaml")), 3, 6)  # another seed draws other rows
    with pytest.raises(BadInput, match=r"who.json: was saved for 3 clients, federation.clients is 4"):
        build(ScenarioSection(str(tmp_path / "mine.yaml")), 4, 5)


def test_generated_tasks_have_no_source_to_be_dealt_by(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"mine.yaml: tasks.charts: generated examples have no field city"):
        build(write(tmp_path, {}, {"kind": "by-source", "field": "city"}), 2, 0)


def test_by_task_gives_every_task_clients_of_its_own(tmp_path: Path) -> None:
    scenario = build(write(tmp_path, {}, {"kind": "by-task"}), 3, 0)
    assert [[len(rows) for rows in shares] for shares in scenario.shares] == [[20, 0, 20], [0, 40, 0]]


@pytest.mark.parametrize(
    ("arrival", "message"),
    [
        ({"kind": "asynchronous", "lag": 2}, r"lag: must be below federation.rounds_per_stage \(2\), got 2"),
        ({"kind": "trace", "file": "gone.json"}, r".*gone.json: no such file"),
        ({"kind": "asynchronous", "late": 0.9}, r"late and leave: no client is present in round 1 of the run"),
    ],
)
def test_what_is_wrong_with_arrival_names_file_and_key(tmp_path: Path, arrival: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=rf"mine.yaml: arrival: {message}"):
        build(write(tmp_path, arrival, IID), 3, 0, rounds=2)
