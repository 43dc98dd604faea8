"""A scenario's questions, on one made by hand, and its hash in other processes."""

import dataclasses
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from fedstrata.core.config import ScenarioSection
from fedstrata.scenarios import build
from fedstrata.scenarios.images import ImageFile, ZipMember
from fedstrata.scenarios.stream import Example, Pixels, Scenario, Task, digest


def task(name: str, rows: int) -> Task:
    examples = tuple(Example(f"{name}{row}", "What?", f"{row}") for row in range(rows))
    return Task(name, train=examples, test=examples[:1])


@pytest.fixture
def scenario() -> Scenario:
    return Scenario(
        name="hand",
        tasks=(task("a", 5), task("b", 4), task("c", 3)),
        stages=((0,), (1, 2), (0, 1, 2)),
        assign=None,
        shares=(((0, 1, 4), (2, 3)), ((1,), (0, 2, 3)), ((0,), (1, 2))),
        vocabularies=(frozenset("01234"), frozenset("0123"), frozenset("012")),
        beta=1.0,
        seed=0,
        hash="0" * 64,
    )


def test_homogeneous_participants_train_the_stage(scenario: Scenario) -> None:
    assert [scenario.tasks_of(1, position) for position in range(3)] == [(1, 2)] * 3
    assert scenario.stage_names == ("1 a", "2 b+c", "3 a+2 more")
    assert scenario.client_count == 2


def test_heterogeneous_participants_train_the_task_of_their_position(scenario: Scenario) -> None:
    scenario = dataclasses.replace(scenario, assign=((0, 0), (2, 1, 1), (2, 0, 1)))
    assert [scenario.tasks_of(1, position) for position in range(7)] == [(2,), (1,), (1,), (2,), (1,), (1,), (2,)]


def test_a_share_is_by_task_then_in_the_tasks_order(scenario: Scenario) -> None:
    for asked in ((0, 2), (2, 0), (2, 0, 2)):
        assert [row.id for row in scenario.share(asked, 0)] == ["a0", "a1", "a4", "c0"]
        assert scenario.share_size(asked, 0) == 4
    assert scenario.share((), 1) == []


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
    assert key == scenario.data_key((1, 0), 0)
    assert key != scenario.data_key((0,), 0)
    assert key != scenario.data_key((0, 1), 1)
    others = dataclasses.replace(scenario, shares=(((0, 1, 4), (2,)), ((1,), (0,)), ((), ())), hash="1" * 64)
    assert key == others.data_key((0, 1), 0)
    assert scenario.data_key((0, 1), 1) != others.data_key((0, 1), 1)
    changed = dataclasses.replace(scenario.tasks[0], train=(*task("a", 4).train, Example("a4", "What?", "new")))
    assert key != dataclasses.replace(scenario, tasks=(changed, *scenario.tasks[1:])).data_key((0, 1), 0)


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
    assert (copy.hash, copy.shares) == (scenario.hash, scenario.shares)
    assert copy.data_key((0,), 1) == scenario.data_key((0,), 1)


def test_hash_and_partition_are_the_same_in_every_process() -> None:
    code = (
        "from fedstrata.core.config import ScenarioSection; from fedstrata.scenarios import build;"
        "s = build(ScenarioSection('fcit-mini-short'), 4, 7); print(s.hash, s.shares, s.data_key((0, 1), 2))"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("0", "4242")
    }
    scenario = build(ScenarioSection("fcit-mini-short"), 4, 7)
    assert told == {f"{scenario.hash} {scenario.shares} {scenario.data_key((0, 1), 2)}\n"}
