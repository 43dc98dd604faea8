"""FCIT's published layout, on a miniature of it: what is found, what is refused, and the four settings' schedules."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedstrata.core import config
from fedstrata.core.config import ScenarioSection
from fedstrata.core.errors import BadInput
from fedstrata.core.scoring import SCORERS
from fedstrata.scenarios import build, defaults
from fedstrata.scenarios.fcit_tables import DATASETS, GROUPS, dataset_of
from fedstrata.scenarios.stream import Scenario

TASK = ["ImageNet-R", "ArxivQA", "IconQA", "CLEVR-Math", "OCRVQA", "Flickr30k", "FigureQA", "super-CLEVR"]
TASK_HET = ["12456", "34577", "02345", "00137", "12445", "03577", "22577", "55566"]
CAP_HET = ["01133", "02223", "12233", "00011"]


def fcit(root: Path, setting: str, beta: float | None = None, **more: Any) -> Scenario:
    return build(ScenarioSection(f"fcit-{setting}", str(root), beta), 50, 0, 10, **more)


def names(scenario: Scenario, tasks: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(scenario.tasks[task].name for task in tasks)


def test_task_related_folders_are_one_stage_each_in_the_published_order(fcit_root: Path) -> None:
    scenario = fcit(fcit_root, "task-hom")
    assert [names(scenario, stage) for stage in scenario.stages] == [(name,) for name in TASK]
    assert (scenario.assign, scenario.units, scenario.client_count, scenario.beta) == (None, 8, 50, 1.0)
    assert scenario.tasks[0].found == ("Task1 holds ImageNet-R: 300 rows at 50 clients",)


def test_the_order_of_capability_folders_is_read_off_the_data(write_fcit: Callable[..., Path], tmp_path: Path) -> None:
    for place, order in enumerate((["General", "Other", "Math", "Chart"], ["General", "Chart", "Math", "Other"])):
        groups = [GROUPS[name] for name in order]
        root = write_fcit(tmp_path / str(place), rows=60, tests=2, betas=[1.0], capabilities=groups)
        scenario = fcit(root, "cap-hom")
        assert [names(scenario, stage) for stage in scenario.stages] == groups
        assert (scenario.units, len(scenario.tasks)) == (4, 12)


@pytest.mark.parametrize(("setting", "lists"), [("task-het", TASK_HET), ("cap-het", CAP_HET)])
def test_heterogeneous_lists_are_followed_position_by_position(fcit_root: Path, setting: str, lists: list[str]) -> None:
    scenario, hom = fcit(fcit_root, setting), fcit(fcit_root, setting.replace("het", "hom"))
    folders = hom.stages  # what lies in Task1, Task2, ...
    for stage, positions in enumerate(lists, 1):
        for round_ in (1, 10):
            found = [scenario.tasks_of(stage, round_, place, client=7) for place in range(5)]
            assert found == [folders[int(folder)] for folder in positions]
        assert set(scenario.stages[stage - 1]) == {task for folder in positions for task in folders[int(folder)]}


@pytest.mark.parametrize("setting", ["task-hom", "cap-hom"])
@pytest.mark.parametrize("beta", [0.5, 1.0, 5.0])
def test_a_client_holds_exactly_the_rows_of_its_file(fcit_root: Path, setting: str, beta: float) -> None:
    scenario = fcit(fcit_root, setting, beta)
    kind = {"task-hom": "Task-related/seq", "cap-hom": "Capability-related/cap"}[setting]
    for client in (0, 17, 49):
        path = fcit_root / "partitioned_data" / kind / str(beta) / "Task2" / f"client_{client}.json"
        records = json.loads(path.read_text())
        examples = scenario.read(scenario.share(scenario.stages[1], client))
        assert len(examples) == len(records)  # n_k counts records, not turns
        answers = Counter(record["conversations"][1]["value"] for record in records)
        assert Counter(example.answer for example in examples) == answers


def test_tests_come_from_the_published_files_with_their_metrics(fcit_root: Path) -> None:
    scenario = fcit(fcit_root, "cap-hom")
    assert {task.name: task.metric for task in scenario.tasks} == {n: d.metric for n, d in DATASETS.items()}
    assert all(name in SCORERS for task in scenario.tasks for name in (task.metric, *task.beside))
    assert {len(task.test) for task in scenario.tasks} == {8}
    assert all("<image>" not in task.test[0].question for task in scenario.tasks)


def test_captions_belong_to_test_rows_by_position(fcit_root: Path) -> None:
    task = next(task for task in fcit(fcit_root, "task-hom").tasks if task.name == "Flickr30k")
    for row in task.test:
        assert len(row.references) == 5
        assert {text.rstrip(".").removesuffix(" indeed") in text for text in row.references} == {True}
        assert all(text.startswith(row.answer) for text in row.references)


def test_grounding_rows_train_all_their_turns_and_are_scored_by_their_box(fcit_root: Path) -> None:
    task = next(task for task in fcit(fcit_root, "cap-hom").tasks if task.name == "Grounding")
    assert {len(row.more) for row in task.train} == {1}
    assert all(re.fullmatch(r"\[0\.\d+(, 0\.\d+){3}\]", row.answer) for row in task.test)


def test_quirks_of_paths_and_ids_are_taken_in(fcit_root: Path) -> None:
    tasks = {task.name: task for task in fcit(fcit_root, "task-hom").tasks}
    pictures = [tasks[name].train[0].image for name in ("ArxivQA", "IconQA")]
    assert all(picture is not None and picture.open().size == (32, 32) for picture in pictures)
    assert [getattr(picture, "name", "")[:7] for picture in pictures] == ["ArxivQA", "IconQA/"]
    assert tasks["CLEVR-Math"].train[0].question.endswith("single word or phrase.")


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"image": "./super-CLEVR/images/a.png"}, "super-CLEVR"),
        ({"image": "CLEVR\\images\\a.png"}, "CLEVR-Math"),
        ({"image": "COCO2014/train2014/a.jpg", "answer_bbox": "[0.1, 0.2, 0.3, 0.4]"}, "Grounding"),
        ({"image": "COCO2014/train2014/a.jpg", "conversations": [{"from": "gpt", "value": "winter"}]}, "AOKVQA"),
        ({"image": "COCO2014/a.jpg", "conversations": [{"from": "gpt", "value": "[0.1, 0.2, 0.3, 0.4]"}]}, "Grounding"),
        ({"image": "Elsewhere/a.png"}, "?Elsewhere"),
        ({}, "?(no image)"),
        ({"image": 5, "conversations": [None, {"value": 3}]}, "?5"),
    ],
)
def test_a_records_dataset_is_read_off_its_pictures_path(record: dict[str, Any], name: str) -> None:
    assert dataset_of(record) == name


@pytest.fixture
def small(write_fcit: Callable[..., Path], tmp_path: Path) -> Path:
    return write_fcit(tmp_path / "data", rows=60, tests=2, betas=[1.0])


def change(path: Path, place: int, **fields: Any) -> None:
    records = json.loads(path.read_text())
    records[place] |= fields
    path.write_text(json.dumps(records))


def _mix(seq: Path) -> None:
    change(seq / "Task2/client_3.json", 0, image=json.loads((seq / "Task1/client_0.json").read_text())[0]["image"])


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "folder missing": (lambda seq: shutil.rmtree(seq / "Task4"), r"1\.0: must hold Task1 … Task8, got Task1, Task2"),
    "client missing": (
        lambda seq: (seq / "Task3/client_7.json").unlink(),
        "Task3: holds 49 client files, federation.c",
    ),
    "client renamed": (
        lambda seq: (seq / "Task3/client_7.json").rename(seq / "Task3/client_70.json"),
        r"Task3: must hold client_0.json … client_49.json, got no client_7.json",
    ),
    "two datasets in one folder": (_mix, r"Task2: must hold one dataset, got ArxivQA \(\d+\), ImageNet-R \(1\)"),
    "the same dataset twice": (
        lambda seq: (shutil.rmtree(seq / "Task2"), shutil.copytree(seq / "Task1", seq / "Task2")),
        "ImageNet-R must lie in one Task folder, got 2",
    ),
    "unknown dataset": (
        lambda seq: (
            (seq.parents[3] / "datasets/New").mkdir(),
            shutil.copy(seq.parents[3] / "datasets/ArxivQA/images/1.jpg", seq.parents[3] / "datasets/New/1.jpg"),
            change(seq / "Task2/client_3.json", 0, image="New/1.jpg"),
        ),
        r"Task2/client_3.json: record 1: image must begin with one of FCIT's folders .* got 'New/1.jpg'",
    ),
    "picture missing": (
        lambda seq: change(seq / "Task5/client_3.json", 0, image="OCR-VQA/images/gone.jpg"),
        r"OCRVQA: 1 images are missing: 'OCR-VQA/images/gone.jpg' \(client_3.json: record 1\)",
    ),
    "test file missing": (
        lambda seq: (seq.parents[3] / "instructions/IconQA/val.json").unlink(),
        "IconQA/val.json: no such file",
    ),
    "captions missing": (
        lambda seq: (seq.parents[3] / "instructions/Flickr30k-cap/val_coco_type.json").write_text(
            '{"annotations": []}'
        ),
        "val_coco_type.json: every test row must have a caption, image_id 1 has none",
    ),
    "captions for other rows": (
        lambda seq: (seq.parents[3] / "instructions/Flickr30k-cap/val_coco_type.json").write_text(
            '{"annotations": [{"image_id": 9, "caption": "a"}]}'
        ),
        r"annotation 1: image_id must be 1 … 2, the number of test rows, .* got 9",
    ),
    "captions are no captions": (
        lambda seq: (seq.parents[3] / "instructions/Flickr30k-cap/val_coco_type.json").write_text("[1]"),
        "val_coco_type.json: not a COCO caption file",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_as_published_is_one_clear_message(small: Path, case: str) -> None:
    spoil, message = BROKEN[case]
    spoil(small / "partitioned_data/Task-related/seq/1.0")
    with pytest.raises(BadInput, match=message):
        fcit(small, "task-hom")


def test_beta_and_root_must_be_published_ones(small: Path) -> None:
    with pytest.raises(BadInput, match=r"scenario.beta: FCIT's partitions exist for 0.5, 1.0, 5.0, got 2.0"):
        fcit(small, "task-hom", 2.0)
    with pytest.raises(BadInput, match="no such folder"):
        fcit(small, "task-hom", 0.5)
    with pytest.raises(BadInput, match=r"seq/1.0: no such folder .*; scenario.root must be the folder that holds"):
        fcit(small / "instructions", "task-hom")


def test_missing_pictures_are_listed_when_asked_to(small: Path) -> None:
    change(small / "partitioned_data/Task-related/seq/1.0/Task5/client_3.json", 0, image="OCR-VQA/images/gone.jpg")
    scenario = fcit(small, "task-hom", strict=False)
    assert scenario.tasks[4].missing == ("'OCR-VQA/images/gone.jpg' (client_3.json: record 1)",)


def test_the_hash_follows_content_and_setting_but_not_the_folder(small: Path, tmp_path: Path) -> None:
    first = fcit(small, "task-hom").hash
    moved = tmp_path / "moved"
    shutil.copytree(small, moved)
    assert fcit(moved, "task-hom").hash == first
    assert fcit(moved, "task-het").hash != first
    path = moved / "instructions/Flickr30k-cap/val_coco_type.json"
    path.write_text(path.read_text().replace("indeed.", "perhaps."))
    assert fcit(moved, "task-hom").hash != first


@pytest.mark.parametrize(("setting", "batch"), [("task-hom", 128), ("task-het", 128), ("cap-hom", 64), ("cap-het", 64)])
def test_a_setting_brings_the_published_hyper_parameters(setting: str, batch: int) -> None:
    run = config.build([defaults(f"fcit-{setting}")])
    f, t, a = run.federation, run.train, run.lora
    assert (f.clients, f.clients_per_round, f.rounds_per_stage, f.sampling) == (50, 5, 10, "fcit")
    assert (t.lr, t.batch_size, t.local_epochs, t.schedule, t.warmup_ratio, t.weight_decay) == (
        2e-4,
        batch,
        1,
        "cosine",
        0.03,
        0,
    )
    assert (a.rank, a.alpha / a.rank, a.dropout, a.init) == (8, 2.0, 0.05, "normal")
    assert sorted(a.targets) == ["down_proj", "gate_proj", "up_proj"]
    assert (run.model.max_new_tokens, run.model.image_fit, t.max_length, t.overlong) == (128, "pad", 2048, "cut")
    assert run.model.system.startswith("A chat between a curious user and an artificial intelligence assistant. The")
    assert run.strategy.projector == "shared"
