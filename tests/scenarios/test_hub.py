"""Hugging Face datasets from local folders: no test touches a network."""

import io
import json
import multiprocessing
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from fedstrata.core.config import ScenarioSection
from fedstrata.core.errors import BadInput
from fedstrata.scenarios import build, hub, images
from fedstrata.scenarios.files import Found, Reading
from fedstrata.scenarios.hub import load_hub
from fedstrata.scenarios.rows import Rows

datasets: Any = pytest.importorskip("datasets")
parquet: Any = pytest.importorskip("pyarrow.parquet")

COLOURS = ["red", "green", "blue"]


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    yield
    hub._opened.cache_clear()


def picture(colour: tuple[int, int, int] = (255, 0, 0)) -> dict[str, Any]:
    data = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(data, "PNG")
    return {"bytes": data.getvalue(), "path": None}


def table(rows: int = 9, **columns: list[Any]) -> Any:
    content = {
        "id": [f"r{n}" for n in range(rows)],
        "ask": [f"What is {n}?" for n in range(rows)],
        "colour": [n % 3 for n in range(rows)],
        "pic": [picture((n, 0, 0)) if n != 4 else None for n in range(rows)],
        **columns,
    }
    features = {"id": datasets.Value("string"), "ask": datasets.Value("string")}
    features |= {"colour": datasets.ClassLabel(names=COLOURS), "pic": datasets.Image()}
    features |= {name: datasets.Value("string") for name in columns if name not in features}
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


READING = Reading(format="fields", fields={"question": "ask", "answer": "colour", "image": "pic"})


def load(folder: Path, split: str = "train", reading: Reading = READING, subset: str | None = None) -> Rows:
    return load_hub(str(folder), subset, split, reading, Found())


@pytest.fixture(params=["saved", "parquet"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "saved":
        datasets.DatasetDict(train=table(), test=table(3)).save_to_disk(tmp_path / "data")
    else:
        for split, rows in (("train", 9), ("test", 3)):
            table(rows).to_parquet(tmp_path / "data" / f"{split}.parquet")
    return tmp_path / "data"


def test_rows_and_pictures_are_read_from_a_folder(stored: Path) -> None:
    rows = load(stored)
    assert [(row.id, row.question, row.answer) for row in rows] == [
        (f"r{n}", f"What is {n}?", COLOURS[n % 3]) for n in range(9)
    ]
    assert [row.image is None for row in rows] == [n == 4 for n in range(9)]
    image = rows[7].image
    assert image is not None
    assert (image.open().size, image.open().getpixel((0, 0))) == ((4, 3), (7, 0, 0))
    assert getattr(image, "name", "") == "train/7.pic"
    assert len({row.image.key() for split in ("train", "test") for row in load(stored, split) if row.image}) == 11
    assert pickle.loads(pickle.dumps(image)).open().getpixel((0, 0)) == (7, 0, 0)
    assert len(np.unique(rows.marks.asked)) == 9


def test_both_kinds_of_folder_hold_the_same_rows(tmp_path: Path) -> None:
    datasets.DatasetDict(train=table()).save_to_disk(tmp_path / "saved")
    table().to_parquet(tmp_path / "files" / "train.parquet")
    assert load(tmp_path / "saved").marks.digest == load(tmp_path / "files").marks.digest


def test_conversations_in_json_lines_are_read_and_filtered(tmp_path: Path) -> None:
    said = [("human", "A?"), ("gpt", "a"), ("human", "B?"), ("gpt", "b")]
    records = [
        {"id": n, "kind": kind, "conversations": [{"from": who, "value": f"{text}{n}"} for who, text in said]}
        for n, kind in enumerate(["text", "vqa"] * 150)
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text("\n".join(map(json.dumps, records)))
    rows = load(tmp_path / "data", reading=Reading(where={"kind": "vqa"}, source="kind"))
    assert len(rows) == 150
    assert (rows[149].id, rows[149].more) == ("299", (("B?299", "b299"),))
    assert rows.marks.source is not None
    single = load(tmp_path / "data", reading=Reading(whole=False, answers=frozenset({"b7"})))
    assert [(row.id, row.question) for row in single] == [("7#2", "B?7")]


ALPACA = [{"instruction": f"Add {n}.", "input": "1 2" if n % 2 else "", "output": f"is {n}"} for n in range(20)]


@pytest.mark.parametrize("kind", ["lines", "saved split", "parquet"])
def test_a_task_of_texts_alone_needs_no_images(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "data"
    if kind == "lines":
        folder.mkdir()
        (folder / "train.jsonl").write_text("\n".join(map(json.dumps, ALPACA)))
    elif kind == "parquet":
        datasets.Dataset.from_list(ALPACA).to_parquet(folder / "train.parquet")
    else:
        datasets.Dataset.from_list(ALPACA).save_to_disk(folder)
    block = {"dataset": "data", "train": "train", "test": "train", "format": "alpaca"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"tasks": {"mine": block}, "stages": [["mine"]]}))
    scenario = build(ScenarioSection(str(tmp_path / "mine.yaml")), 2, 0)
    asked = [f"Add {n}.\n1 2" if n % 2 else f"Add {n}." for n in range(20)]
    assert [(row.id, row.question, row.answer, row.image) for row in scenario.tasks[0].test] == [
        (str(n + 1), asked[n], f"is {n}", None) for n in range(20)
    ]
    assert {row.question for row in scenario.read(scenario.share((0,), 0))} <= set(asked)


def tell_colours(rows: Rows, told: Any) -> None:
    told.put([row.image.open().getpixel((0, 0))[0] if row.image else None for row in rows])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_reads_and_so_does_its_parent(stored: Path) -> None:
    rows, context = load(stored), multiprocessing.get_context("fork")
    told = context.SimpleQueue()
    child = context.Process(target=tell_colours, args=(rows, told))
    child.start()
    assert told.get() == [0, 1, 2, 3, None, 5, 6, 7, 8]
    child.join()
    assert child.exitcode == 0
    assert rows[8].image.open().getpixel((0, 0)) == (8, 0, 0)  # type: ignore[union-attr]


def test_names_of_pictures_may_be_relative_to_a_folder(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (4, 3)).save(tmp_path / "pictures/1.png")
    for split, name in (("train", "1.png"), ("test", "2.png"), ("bad", "../1.png")):
        data = datasets.Dataset.from_dict({"prompt": ["What?"], "answer": ["red"], "image": [name]})
        data.to_parquet(tmp_path / "data" / f"{split}.parquet")
    files = {split: str(tmp_path / "data" / f"{split}.parquet") for split in ("train", "test", "bad")}
    datasets.DatasetDict({s: datasets.Dataset.from_parquet(f) for s, f in files.items()}).save_to_disk(tmp_path / "s")
    reading, found = Reading(images=images.FolderImages(tmp_path / "pictures")), Found()
    image = load(tmp_path / "s", "train", reading)[0].image
    assert image is not None
    assert image.open().size == (4, 3)
    load_hub(str(tmp_path / "s"), None, "test", reading, found)
    assert found.missing == ["'2.png' (test: record 1)"]
    with pytest.raises(BadInput, match=r"split bad: record 1: image must be a relative path .* got '../1.png'"):
        load(tmp_path / "s", "bad", reading)


def test_pictures_outside_the_dataset_are_not_read(tmp_path: Path) -> None:
    Image.new("RGB", (4, 3)).save(tmp_path / "secret.png")
    (tmp_path / "data").mkdir()
    Image.new("RGB", (4, 3)).save(tmp_path / "data/1.png")
    (tmp_path / "data/2.png").symlink_to(tmp_path / "secret.png")
    names = ["secret.png", "data/../secret.png", "data/2.png", "data/gone.png", "data/1.png"]
    paths = [{"bytes": None, "path": str(tmp_path / name)} for name in names]
    parquet.write_table(table(5, pic=paths).data.table, tmp_path / "data/train.parquet")
    rows = load(tmp_path / "data")
    for row, rule in ((0, "stored in the dataset"), (1, "stored in"), (2, "stored in"), (3, "not a readable image")):
        with pytest.raises(BadInput, match=rule):
            rows[row].image.open()  # type: ignore[union-attr]
    assert rows[4].image.open().size == (4, 3)  # type: ignore[union-attr]


def test_pictures_keep_to_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [picture(), {"bytes": b"no image", "path": None}, {"bytes": b"", "path": None}]
    datasets.DatasetDict(train=table(3, pic=pictures)).save_to_disk(tmp_path / "data")
    rows = load(tmp_path / "data")
    for row in (1, 2):
        with pytest.raises(BadInput, match=rf"data//train/{row}.pic: not a readable image"):
            rows[row].image.open()  # type: ignore[union-attr]
    monkeypatch.setattr(images, "MOST_BYTES", 20)
    with pytest.raises(BadInput, match="at most 20 bytes"):
        rows[0].image.open()  # type: ignore[union-attr]


def test_a_record_that_breaks_a_rule_is_named(tmp_path: Path) -> None:
    data = table(300, ask=["What?"] * 270 + [" "] + ["What?"] * 29)
    datasets.DatasetDict(train=data).save_to_disk(tmp_path / "data")
    with pytest.raises(BadInput, match=r"data, split train: record 271: ask must not be empty"):
        load(tmp_path / "data")
    with pytest.raises(BadInput, match=r"record 1: must be of a known form"):
        load(tmp_path / "data", reading=Reading())
    datasets.DatasetDict(train=table()).save_to_disk(tmp_path / "good")
    with pytest.raises(BadInput, match=r"split train: no row is left by answers \['black'\]"):
        load(tmp_path / "good", "train", Reading("fields", fields=READING.fields, answers=frozenset({"black"})))


@pytest.mark.parametrize("split", ["valid", "train[", "", "../train"])
def test_a_split_that_is_not_there_is_one_line(stored: Path, split: str) -> None:
    with pytest.raises(BadInput, match=r"^dataset .*data, split ") as caught:
        load(stored, split)
    assert "\n" not in str(caught.value)


def test_what_the_library_cannot_load_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/train.parquet").write_bytes(b"PAR1 not really")
    datasets.DatasetDict(train=table()).save_to_disk(tmp_path / "cut")
    for file in (tmp_path / "cut/train").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:300])
    for name in ("empty", "bad", "cut", "gone/dataset", "no such name"):
        with pytest.raises(BadInput, match=rf"dataset .*{name}.*, split train: ") as caught:
            load_hub(name if name.startswith(("gone", "no")) else str(tmp_path / name), None, "train", READING, Found())
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600
    datasets.DatasetDict(train=table()).save_to_disk(tmp_path / "data")
    with pytest.raises(BadInput, match="subset fine, split train: must be there, got a folder with splits"):
        load(tmp_path / "data", subset="fine")


def test_without_the_library_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadInput, match=r"split train: needs the datasets library: pip install 'fedstrata\[hub\]'"):
        load(tmp_path)


def test_a_scenario_names_a_dataset_relative_to_its_folder(stored: Path, capfd: pytest.CaptureFixture[str]) -> None:
    block = {"dataset": "data", "train": "train", "test": "test", "format": "fields", "fields": dict(READING.fields)}
    path = stored.parent / "mine.yaml"
    path.write_text(yaml.safe_dump({"tasks": {"mine": block}, "stages": [["mine"]]}))
    scenario = build(ScenarioSection(str(path)), 2, 0)
    assert (len(scenario.tasks[0].train), len(scenario.tasks[0].val), len(scenario.tasks[0].test)) == (8, 1, 3)
    assert scenario.vocabulary(0) == set(COLOURS)
    assert {row.answer for row in scenario.read(scenario.share((0,), 0))} <= set(COLOURS)
    assert capfd.readouterr() == ("", "")  # no progress bars
