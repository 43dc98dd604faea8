"""Scenario files: the packaged ones, one's own, and every way to get one wrong."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from fedstrata.core import config
from fedstrata.core.config import ScenarioSection
from fedstrata.core.errors import BadInput
from fedstrata.scenarios import build, catalogue, defaults, is_scenario_file
from fedstrata.scenarios.mini import MINI_TASKS
from fedstrata.scenarios.stream import Task, image_word

HET = [[1, 2, 4, 5, 6], [3, 4, 5, 7, 7], [0, 2, 3, 4, 5], [0, 0, 1, 3, 7]]
HET += [[1, 2, 4, 4, 5], [0, 3, 5, 7, 7], [2, 2, 5, 7, 7], [5, 5, 5, 6, 6]]


def records(split: str, rows: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"{split}{row}",
            "image": f"{row % 4}.png",
            "conversations": [
                {"from": "human", "value": f"<image>\nWhat is number {row} of {split}?"},
                {"from": "gpt", "value": "red" if row % 2 else "blue"},
            ],
        }
        for row in range(rows)
    ]


def tree() -> dict[str, Any]:
    return {
        "tasks": {
            "mine": {"train": "train.json", "test": "test.json", "images": "images"},
            "theirs": {"train": "train.json", "test": "test.json", "images": "images", "suffix": "One word."},
        },
        "stages": [["mine"], ["theirs"]],
        "partition": {"kind": "dirichlet", "beta": 2.0},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in range(4):
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / f"{name}.png")
    for split, rows in (("train", 40), ("test", 6)):
        (tmp_path / f"{split}.json").write_text(json.dumps(records(split, rows)))
    return tmp_path


def write(folder: Path, content: Any, name: str = "mine.yaml") -> ScenarioSection:
    (folder / name).write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return ScenarioSection(str(folder / name))


def changed(path: str, value: Any) -> dict[str, Any]:
    """`tree()` with the value at `a.b.c` replaced, or removed for `...`."""
    whole = node = tree()
    *parents, last = path.split(".")
    for part in parents:
        node = node.setdefault(part, {})
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return whole


def content(task: Task) -> list[set[tuple[str, str]]]:
    return [{(image_word(row), row.question) for row in split} for split in (task.train, task.val, task.test)]


def test_the_catalogue_describes_every_packaged_scenario() -> None:
    known = catalogue()
    assert {"fcit-mini", "fcit-mini-het", "fcit-mini-short", "real-images"} <= set(known)
    assert all(text.endswith(".") and len(text) < 150 and ":" not in text.split()[0] for text in known.values())


@pytest.mark.parametrize("name", sorted(catalogue()))
def test_packaged_defaults_are_a_valid_config(name: str) -> None:
    assert config.build([defaults(name)]).federation.clients >= 4


def test_fcit_mini_has_one_task_a_stage_and_depends_on_the_seed_alone() -> None:
    first = build(ScenarioSection("fcit-mini"), 20, 0)
    assert [task.name for task in first.tasks] == list(MINI_TASKS)
    assert first.stages == tuple((task,) for task in range(8))
    assert {(len(task.train), len(task.val), len(task.test)) for task in first.tasks} == {(1200, 100, 150)}
    assert (first.client_count, first.beta, first.assign, first.name) == (20, 1.0, None, "fcit-mini")
    assert min(len(share) for shares in first.shares for share in shares) >= 3
    assert len({tuple(map(tuple, shares)) for shares in first.shares}) == 8
    for task, answers in zip(first.tasks, first.vocabularies, strict=True):
        assert {row.answer for row in (*task.train, *task.val, *task.test)} <= answers


def test_fcit_mini_het_follows_the_published_lists() -> None:
    scenario = build(ScenarioSection("fcit-mini-het"), 20, 0)
    assert scenario.assign == tuple(tuple((task,) for task in positions) for positions in HET)
    assert [list(stage) for stage in scenario.stages] == [sorted(set(positions)) for positions in HET]
    assert scenario.seen(1) == (False, True, True, False, True, True, True, False)
    assert scenario.seen(3) == (True,) * 8


def test_seed_clients_beta_and_content_are_in_the_hash_but_no_path(folder: Path) -> None:
    def hash_of(tree: dict[str, Any], clients: int = 4, seed: int = 0, **section: Any) -> str:
        return build(ScenarioSection(write(folder, tree).name, **section), clients, seed).hash

    hashes = [hash_of(tree()), hash_of(tree(), clients=5), hash_of(tree(), seed=1), hash_of(tree(), beta=9.0)]
    hashes.append(hash_of(changed("stages", [["theirs"], ["mine"]])))
    hashes.append(hash_of(changed("tasks.mine.test_rows", 3)))
    assert len(set(hashes)) == len(hashes)
    assert hash_of(tree(), beta=2.0) == hashes[0]
    assert hash_of(changed("defaults", {"lora": {"rank": 2}})) == hashes[0]
    shutil.copytree(folder, folder / "moved")
    assert build(ScenarioSection(str(folder / "moved/mine.yaml"), beta=2.0), 4, 0).hash == hashes[0]
    assert hash_of(tree(), root=str(folder / "moved")) == hashes[0]


def test_ones_own_files_become_tasks(folder: Path) -> None:
    scenario = build(write(folder, tree()), 3, 0)
    assert (scenario.name, scenario.stage_names) == ("mine", ("1 mine", "2 theirs"))
    assert scenario.tasks[1].test[0].question == "What is number 0 of test?\nOne word."
    assert scenario.vocabulary(0) == {"red", "blue"}
    picture = scenario.read(scenario.share((0,), 0))[0].image
    assert picture is not None
    assert picture.open().size == (4, 4)


@pytest.mark.parametrize("rows", [None, 10, 39, 40, 100])
def test_validation_rows_are_held_out_of_train(folder: Path, rows: int | None) -> None:
    task = build(write(folder, changed("tasks.mine.train_rows", rows)), 2, 0).tasks[0]
    train, val, _ = content(task)
    assert not train & val
    assert len(task.val) == (4 if rows != 39 else 1)
    assert len(task.train) == (rows if rows in (10, 39) else 36)


def test_rows_with_equal_content_are_never_on_both_sides(folder: Path) -> None:
    (folder / "train.json").write_text(json.dumps(records("train", 20) * 3))
    for rows in (None, 25):
        task = build(write(folder, changed("tasks.mine.train_rows", rows)), 2, 0).tasks[0]
        train, val, _ = content(task)
        assert train
        assert val
        assert not train & val


def test_a_single_row_stays_in_train_and_a_val_file_is_taken_whole(folder: Path) -> None:
    (folder / "val.json").write_text(json.dumps(records("val", 5)))
    task = build(write(folder, changed("tasks.mine.val", "val.json")), 2, 0).tasks[0]
    assert (len(task.train), len(task.val)) == (40, 5)
    (folder / "train.json").write_text(json.dumps(records("train", 1)))
    task = build(write(folder, tree()), 1, 0).tasks[0]
    assert (len(task.train), len(task.val)) == (1, 0)


def test_root_takes_one_environment_variable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "recipes").mkdir()
    section = write(folder / "recipes", tree() | {"root": "${MY_DATA}/.."})
    monkeypatch.setenv("MY_DATA", str(folder / "images"))
    assert len(build(section, 2, 0).tasks) == 2
    monkeypatch.delenv("MY_DATA")
    with pytest.raises(BadInput, match=r"mine.yaml: root: .* MY_DATA is not set; .* export MY_DATA=/path/to/data"):
        build(section, 2, 0)
    assert build(ScenarioSection(section.name, root=str(folder)), 2, 0).client_count == 2
    assert defaults(section.name) == {}  # reads no data
    assert len(build(write(folder / "recipes", tree() | {"root": ".."}), 2, 0).tasks) == 2


def test_scenario_files_are_told_from_recipes(folder: Path) -> None:
    write(folder, tree())
    for name, text in (("recipe.yaml", "seed: 1"), ("broken.yaml", "a: [1"), ("date.yaml", "tasks: 2001-99-99")):
        (folder / name).write_text(text)
        assert not is_scenario_file(folder / name)
    assert is_scenario_file(folder / "mine.yaml")
    assert not is_scenario_file(folder / "gone.yaml")
    assert not is_scenario_file(folder)
    assert not is_scenario_file(folder / "images/0.png")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fcit-mni", r"scenario.name: unknown 'fcit-mni'; did you mean 'fcit-mini'\? known: .*fcit-mini"),
        ("", "scenario.name: unknown ''"),
        ("gone.yaml", r"gone.yaml: no such file"),
        ("a/b", r"a/b: no such file"),
    ],
)
def test_unknown_scenarios_are_refused(name: str, message: str) -> None:
    for call in (defaults, lambda name: build(ScenarioSection(name), 4, 0)):
        with pytest.raises(BadInput, match=message):
            call(name)


WRONG_KEYS: list[tuple[str, Any, str]] = [
    ("tasks", ..., "tasks: must be a mapping"),
    ("tasks", {}, "tasks: must be a mapping with at least one task"),
    ("tasks", {1: {}}, "tasks: must be a mapping whose keys are texts"),
    ("tasks.mine", "x", "tasks.mine: must be a mapping"),
    ("tasks.mine.trian", "x", r"tasks.mine.trian: unknown 'trian'; did you mean 'train'\?"),
    ("tasks.mine.train", ..., "tasks.mine: must have the key train"),
    ("tasks.mine.train", 5, "tasks.mine.train: must be a text, got 5"),
    ("tasks.mine.train", "gone.json", "gone.json: no such file"),
    ("tasks.mine.train", "images", "images: no such file"),
    ("tasks.mine.images", "gone", "gone: no such image folder"),
    ("tasks.mine.images", None, "record 1: the task must name its images"),
    ("tasks.mine.images", True, "tasks.mine.images: must be a text or null, got True"),
    ("tasks.mine.format", "llama", "tasks.mine.format: unknown 'llama'; did you mean 'llava'"),
    ("tasks.mine.metric", "exact_mtch", "tasks.mine.metric: unknown 'exact_mtch'; did you mean 'exact_match'"),
    ("tasks.mine.suffix", "\ud800", "tasks.mine.suffix: must be a text"),
    ("tasks.mine.train_rows", 0, "tasks.mine.train_rows: must be at least 1, got 0"),
    ("tasks.mine.train_rows", 1.5, "tasks.mine.train_rows: must be a whole number or null, got 1.5"),
    ("tasks.mine.train_rows", True, "tasks.mine.train_rows: must be a whole number"),
    ("tasks.mine", {"generate": "fcit-mini/name"}, "tasks.mine.generate: .* did you mean 'fcit-mini/names'"),
    ("tasks.mine", {"generate": "fcit-mini/names", "train": 0}, "tasks.mine.train: must be between 1 and 20,000"),
    ("tasks.mine", {"generate": "fcit-mini/names", "images": "x"}, "tasks.mine.images: unknown 'images'"),
    ("stages", ..., "stages: must be a list of lists of task names"),
    ("stages", [], "stages: must be a list"),
    ("stages", ["mine"], "stages: must be a list of lists"),
    ("stages", [["mine"], []], "stages: must be a list of lists"),
    ("stages", [["mnie"]], "stages: unknown 'mnie'; did you mean 'mine'"),
    ("stages", [[1]], "stages: must be lists of task names, got 1"),
    ("stages", [["mine", "mine"]], "stages: stage 1: must be a list without repeats"),
    ("assign", "heterogeneous", "assign: must be homogeneous or a list of lists"),
    ("assign", [["mine"]], "stages: must list, stage by stage, the tasks that assign gives out"),
    ("assign", [["mine"], ["thiers"]], "assign: unknown 'thiers'; did you mean 'theirs'"),
    ("partition", "iid", "partition: must be a mapping"),
    ("partition.kind", "dirichelt", "partition.kind: unknown 'dirichelt'; did you mean 'dirichlet'"),
    ("partition.beta", 0, "partition.beta: must be a finite number above 0, got 0"),
    ("partition.beta", "1", "partition.beta: must be a number"),
    ("partition.min_size", 0, "partition.min_size: must be at least 1"),
    ("partition.min_size", 30, "tasks.mine: partition: 2 clients with at least 30 rows each need 60"),
    ("partition.alpha", 1, "partition.alpha: unknown 'alpha'"),
    ("arrival", {"kind": "stage"}, "arrival.kind: unknown 'stage'; did you mean 'stages'"),
    ("root", 5, "root: must be a text"),
    ("root", "gone", "root: must be an existing folder"),
    ("stage", [], r"stage: unknown 'stage'; did you mean 'stages'\?"),
    ("defaults", [1], "defaults: must be a mapping"),
    ("defaults.federaton", {}, "defaults.federaton: .* did you mean 'federation'"),
    ("defaults.seed", {}, "defaults.seed: unknown 'seed'"),
    ("defaults.run", {"dir": "x"}, "defaults.run: unknown 'run'"),
    ("defaults.scenario", {"name": "x"}, "defaults.scenario: must be without name"),
    ("defaults.federation", {"client": 5}, "defaults.federation.client: .* did you mean 'clients'"),
    ("defaults.lora", 5, "defaults.lora: must be a mapping"),
]


@pytest.mark.parametrize(("path", "value", "message"), WRONG_KEYS)
def test_a_mistake_in_a_scenario_file_is_one_clear_message(folder: Path, path: str, value: Any, message: str) -> None:
    section = write(folder, changed(path, value))
    with pytest.raises(BadInput, match=message) as caught:
        build(section, 2, 0)
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith(str(folder))


@pytest.mark.parametrize("text", ["", "[1]", "a: [1", "tasks: 2001-99-99", "\0", "? [1]\n: 2", "a: &a [*a]", "1: 2"])
def test_what_is_no_scenario_file_is_refused(folder: Path, text: str) -> None:
    with pytest.raises(BadInput, match=r"mine\.yaml"):
        build(write(folder, text), 2, 0)


def test_beta_zero_is_refused_before_anything_is_read() -> None:
    with pytest.raises(BadInput, match=r"scenario.beta: must be a finite number above 0, got 0"):
        ScenarioSection("fcit-mini", beta=0)


def test_bad_data_names_file_and_record(folder: Path) -> None:
    section, path = write(folder, tree()), folder / "train.json"
    good = records("train", 40)
    for text, message in (
        (json.dumps(good)[:-700], r"train.json: record 3\d: .*"),
        (
            json.dumps([*good[:9], good[9] | {"image": "../mine.yaml"}]),
            "train.json: record 10: image must be",
        ),
        (json.dumps([*good, good[0] | {"image": "9.png"}]), r"1 images are missing: '9.png' \(train.json: record 41\)"),
    ):
        path.write_text(text)
        with pytest.raises(BadInput, match=message):
            build(section, 2, 0)


@pytest.mark.usefixtures("real_data")
def test_real_images_are_read_and_disjoint() -> None:
    scenario = build(ScenarioSection("real-images"), 10, 0)
    names = ["easy_vqa", "fashion_mnist", "trashnet", "omniglot_alphabet", "sign_digits", "nlvr"]
    assert [task.name for task in scenario.tasks] == names
    for task in scenario.tasks:
        assert (len(task.train), len(task.val), len(task.test)) == (600, 100, 100)
        train, val, test = content(task)
        assert not train & val
        assert not test & (train | val)
        assert not any("<image>" in row.question for row in task.train)
        answers = [row.answer for row in task.train]
        assert {row.answer for row in task.test} <= set(answers)
        picture = task.train[0].image
        assert picture is not None
        assert 28 <= max(picture.open().size) <= 64
    assert build(ScenarioSection("real-images"), 10, 0).hash == scenario.hash


def test_real_images_without_data_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDSTRATA_REAL_DATA", raising=False)
    with pytest.raises(BadInput, match=r"root: .* export FEDSTRATA_REAL_DATA=/path/to/data"):
        build(ScenarioSection("real-images"), 10, 0)
    assert defaults("real-images")["federation"]["clients"] == 10


def test_one_file_gives_class_and_domain_incremental_streams(folder: Path) -> None:
    rows = [row | {"domain": "day" if n < 20 else "night"} for n, row in enumerate(records("train", 40))]
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "test.json").write_text(json.dumps([row | {"domain": "day"} for row in records("test", 6)]))
    part = {"train": "train.json", "test": "test.json", "val": "test.json", "images": "images"}
    tasks = {
        "red": part | {"answers": ["red"]},
        "blue": part | {"answers": ["blue"]},
        "day": part | {"where": {"domain": "day"}},
    }
    scenario = build(write(folder, {"tasks": tasks, "stages": [["red"], ["blue"], ["day"]]}), 4, 0)
    held = {task.name: {row.answer for row in task.train} for task in scenario.tasks}
    assert held == {"red": {"red"}, "blue": {"blue"}, "day": {"red", "blue"}}
    assert [len(task.train) for task in scenario.tasks] == [20, 20, 20]
    tasks["day"]["where"] = {"domain": "dusk"}
    with pytest.raises(BadInput, match="dusk"):
        build(write(folder, {"tasks": tasks, "stages": [["red"], ["blue"], ["day"]]}), 4, 0)


def test_a_participants_place_may_bring_several_tasks(folder: Path) -> None:
    scenario = build(write(folder, changed("stages", ...) | {"assign": [["mine", ["mine", "theirs"]]]}), 4, 0)
    assert [scenario.tasks_of(1, 1, place, client=0) for place in range(3)] == [(0,), (0, 1), (0,)]
    assert scenario.stages == ((0, 1),)


@pytest.mark.parametrize("arrival", [{"kind": "blurry", "early": 0.1}, {"kind": "stages", "repeats": "fresh"}])
def test_places_and_clocks_exclude_each_other(folder: Path, arrival: dict[str, Any]) -> None:
    broken = changed("stages", ...) | {"assign": [["mine", "theirs"]], "arrival": arrival}
    with pytest.raises(BadInput, match=r"arrival: must be kind stages with repeats same beside heterogeneous assign"):
        build(write(folder, broken), 4, 0)


def test_fcits_files_say_what_a_file_of_ones_own_must(folder: Path) -> None:
    with pytest.raises(BadInput, match=r"partition: must be left out beside fcit"):
        build(write(folder, {"fcit": {"setting": "task-hom"}, "partition": {"kind": "iid"}}), 50, 0)
    with pytest.raises(BadInput, match=r"fcit.setting: unknown 'task-hon'; did you mean 'task-hom'"):
        build(write(folder, {"fcit": {"setting": "task-hon"}}), 50, 0)


@pytest.mark.parametrize("path", ["root", "tasks.mine.dataset"])
def test_names_that_no_file_can_have_are_refused(folder: Path, path: str) -> None:
    with pytest.raises(BadInput, match=r"mine\.yaml|dataset"):
        build(write(folder, changed(path, "a" * 5000)), 4, 0)
