"""`fedstrata preview`: the published schedule position by position, and what a scenario's data look like."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from fedstrata.core.config import RunConfig
from fedstrata.server import configure
from fedstrata.server.preview import Preview, preview
from fedstrata.server.previewpage import save_html, save_png, schedule_table

# The published code's participants: one line a stage, one group a round, in the order of positions.
PARTICIPANTS = [
    "2 41 10 11 28 | 2 35 38 40 27 | 36 9 13 47 28 | 39 9 12 47 31 | 4 6 11 12 48 | "
    "6 42 19 28 29 | 38 7 40 49 23 | 42 13 15 22 30 | 36 44 48 49 23 | 2 37 44 14 21",
    "37 42 44 47 23 | 2 36 37 45 22 | 36 7 41 46 28 | 0 4 43 46 20 | 37 14 47 21 30 | "
    "35 37 38 41 26 | 34 3 36 20 25 | 42 44 16 19 21 | 43 16 20 26 30 | 35 23 24 26 30",
    "4 8 12 45 14 | 7 43 44 14 25 | 32 33 12 47 25 | 32 13 14 17 18 | 32 5 8 19 26 | "
    "36 7 41 46 17 | 2 10 43 44 14 | 6 43 46 14 20 | 9 11 16 27 31 | 35 45 48 22 26",
    "32 41 10 43 20 | 32 2 4 5 31 | 35 41 44 16 49 | 37 5 40 15 27 | 0 1 3 39 16 | "
    "39 22 26 29 31 | 32 11 12 18 29 | 0 37 41 13 49 | 0 40 17 21 29 | 2 47 16 23 29",
    "33 38 45 49 29 | 32 9 14 49 18 | 39 45 13 17 30 | 36 14 19 20 28 | 36 5 37 6 47 | "
    "2 5 7 9 47 | 3 35 9 10 14 | 32 39 40 42 13 | 1 3 8 45 47 | 39 14 16 25 31",
    "1 34 36 38 8 | 0 4 15 48 47 | 3 40 8 19 26 | 1 2 8 21 28 | 38 39 10 49 24 | "
    "3 6 15 22 28 | 38 7 40 45 20 | 39 9 16 20 29 | 5 47 48 16 18 | 32 1 47 48 21",
    "4 38 40 20 28 | 7 41 48 22 29 | 4 39 15 48 31 | 36 8 47 16 31 | 1 33 37 9 13 | "
    "41 45 17 20 23 | 1 4 5 47 25 | 1 6 11 15 20 | 3 37 41 18 30 | 34 4 8 10 19",
    "38 40 47 19 30 | 32 35 4 39 20 | 4 11 48 49 22 | 32 34 49 20 28 | 32 8 16 22 26 | "
    "2 4 5 15 22 | 41 9 45 47 49 | 38 40 45 13 16 | 33 37 10 19 26 | 39 42 44 48 21",
]
ORDER = ["ImageNet-R", "ArxivQA", "IconQA", "CLEVR-Math", "OCRVQA", "Flickr30k", "FigureQA", "super-CLEVR"]
GROUPS = [
    "AOKVQA+IconQA+Grounding+ImageNet-R",
    "Flickr30k+OCRVQA",
    "CLEVR-Math+super-CLEVR+TabMWP",
    "ArxivQA+FigureQA+DVQA",
]
HET = {
    "task-het": "12456 34577 02345 00137 12445 03577 22577 55566",
    "cap-het": "01133 02223 12233 00011",
}
TINY = ["model.name=tiny", "model.text_encoder=base", "model.dtype=float32"]


def look(*words: str) -> tuple[RunConfig, Preview]:
    config = configure.resolve(words[0], words[1:])
    return config, preview(config)[0]


def participants() -> list[list[list[int]]]:
    return [[[int(c) for c in round_.split()] for round_ in stage.split("|")] for stage in PARTICIPANTS]


@pytest.mark.parametrize("setting", ["task-hom", "task-het", "cap-hom", "cap-het"])
def test_the_schedule_is_the_published_one_position_by_position(fcit_root: Path, setting: str) -> None:
    _, told = look(f"fcit-{setting}", f"scenario.root={fcit_root}", *TINY)
    folders = ORDER if setting.startswith("task") else GROUPS
    stages = len(folders)
    lists = HET.get(setting, " ".join(str(stage) * 5 for stage in range(stages))).split()
    expected = [
        [
            str(stage),
            str(round_),
            *(f"{client} {folders[int(lists[stage - 1][place])]}" for place, client in enumerate(row)),
        ]
        for stage, rounds in enumerate(participants()[:stages], 1)
        for round_, row in enumerate(rounds, 1)
    ]
    table = schedule_table(told)
    assert [list(row) for row in zip(*(column._cells for column in table.columns), strict=True)] == expected
    assert told.client_rounds == stages * 50


def test_the_published_schedule_does_not_depend_on_the_seed(fcit_root: Path) -> None:
    schedules = [
        look("fcit-task-hom", f"scenario.root={fcit_root}", f"seed={seed}", *TINY)[1].schedule for seed in (0, 5)
    ]
    assert schedules[0] == schedules[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 training rows of two answers, one of them in test too; one picture is missing."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images/0.png")
    rows: list[dict[str, Any]] = [
        {
            "image": "0.png",
            "conversations": [{"from": "human", "value": f"Is {n} even?"}, {"from": "gpt", "value": answer}],
        }
        for n, answer in enumerate(["yes", "no"] * 20)
    ]
    rows[7]["image"] = "gone.png"
    asked = [{"question_id": n, "image": "0.png", "text": f"Is {n} even?", "answer": "yes"} for n in (38, 50, 51)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    (tmp_path / "test.json").write_text(json.dumps(asked))
    task = {"train": "train.json", "test": "test.json", "val": "test.json", "images": "images", "format": "auto"}
    tree = {"tasks": {"even": task}, "stages": [["even"]], "partition": {"kind": "iid"}}
    tree["defaults"] = {"federation": {"clients": 4, "clients_per_round": 2, "rounds_per_stage": 3}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def test_faults_of_the_data_are_found_before_anything_is_loaded(folder: Path) -> None:
    _, told = look(str(folder / "mine.yaml"))
    (task,) = told.tasks
    assert task.missing == ("'gone.png' (train.json: record 8)",)
    assert (task.train, task.val, task.test, task.answers, task.twice) == (40, 3, 3, 2, 1)
    assert dict(task.labels) == {"yes": 20, "no": 20}
    assert [line.split(":")[0] for line in told.warnings] == ["even", "even"]
    assert "1 pictures are missing" in told.warnings[0]
    assert "1 test rows are in train too" in told.warnings[1]


def test_the_work_is_predicted(folder: Path) -> None:
    config, told = look(str(folder / "mine.yaml"), "train.batch_size=4", "train.local_epochs=3")
    assert (told.client_rounds, told.steps) == (6, 6 * 3 * 3)  # 10 rows a client: 3 steps an epoch
    assert [[cell.samples for cell in row] for row in told.clients] == [[10]] * 4
    assert sum(cell.drawn for row in told.clients for cell in row) == 6
    assert told.bytes is not None
    assert told.bytes.down == told.bytes.up - 4 * 96 * len({visit.client for visit in told.schedule})
    assert config.strategy.name == "disco"


def test_a_base_that_is_not_here_leaves_bytes_and_tokens_unknown(folder: Path) -> None:
    _, told = look(str(folder / "mine.yaml"), "model.name=nobody/has-this")
    assert (told.bytes, told.tasks[0].tokens) == (None, None)
    assert "'nobody/has-this' is not on this machine" in told.unknown


def test_bytes_are_those_of_the_run_plan() -> None:
    from fedstrata.server import launch
    from fedstrata.server.plan import predict

    config, told = look("fcit-mini-short", "federation.grid=inprocess")
    ready = launch.prepare(config)
    dim = ready.description.dim
    assert told.bytes == predict(config, ready.scenario, ready.strategy(), ready.layout, dim)
    assert told.hash == ready.scenario.hash


def test_page_picture_and_json_are_whole(folder: Path) -> None:
    _, told = look(str(folder / "mine.yaml"))
    save_html(told, folder / "a.html")
    page = (folder / "a.html").read_text()
    for text in (told.hash, "gone.png", "<svg", "client", "test rows in train"):
        assert text in page
    assert "http" not in page.replace("http-equiv", "")
    save_png(told, folder / "a.png")
    with Image.open(folder / "a.png") as picture:
        assert picture.size[0] > 100
    assert json.loads(json.dumps(told.json()))["schedule"][0]["tasks"] == ["even"]


def test_a_saved_partition_gives_the_same_shares_again(folder: Path) -> None:
    config = configure.resolve(str(folder / "mine.yaml"), [])
    (folder / "images/gone.png").write_bytes((folder / "images/0.png").read_bytes())
    first = preview(config)[1]
    first.save_partition(folder / "who.json")
    tree = yaml.safe_load((folder / "mine.yaml").read_text())
    tree["partition"] = {"kind": "file", "file": "who.json"}
    (folder / "again.yaml").write_text(yaml.safe_dump(tree))
    second = preview(configure.resolve(str(folder / "again.yaml"), []))[1]
    assert [[rows.tolist() for rows in task] for task in second.shares] == [
        [rows.tolist() for rows in task] for task in first.shares
    ]
