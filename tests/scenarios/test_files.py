"""Instruction files: good ones give rows, bad ones one message with file, record and rule."""

import json
import multiprocessing
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fedstrata.core.errors import BadInput
from fedstrata.scenarios.example import Example
from fedstrata.scenarios.files import Found, Reading, load_file, refuse_missing
from fedstrata.scenarios.images import open_images
from fedstrata.scenarios.rows import Joined, Rows
from fedstrata.scenarios.tasks import hold_out, spread


def record(question: str = "<image>\nWhat?", answer: str = "red", **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


def load(path: Path, images: Path | None = None, **reading: Any) -> Rows:
    """The file's rows, as a run would load them."""
    found = Found()
    pictures = None if images is None else open_images(images)
    rows = load_file(path, Reading(**{"format": "llava", "images": pictures, **reading}), found)
    refuse_missing(found, str(path))
    return rows


def load_examples(path: Path, images: Path | None = None, **reading: Any) -> list[Example]:
    return list(load(path, images, **reading))


def write(folder: Path, content: Any, name: str = "train.json") -> Path:
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("images/1.png", "images/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(tmp_path / "images/1.png", "images/1.png")
    return tmp_path


def test_question_answer_and_image_are_taken_and_extra_keys_ignored(folder: Path) -> None:
    path = write(folder, [record(id="a", image="1.png", source="web", model={"x": 1})])
    (example,) = load_examples(path, folder / "images")
    assert (example.id, example.question, example.answer) == ("a", "What?", "red")
    assert example.image is not None
    assert example.image.open().size == (4, 4)


def test_images_may_lie_in_a_zip(folder: Path) -> None:
    (example,) = load_examples(write(folder, [record(image="./images/1.png")]), folder / "images.zip")
    assert example.image is not None
    assert example.image.open().mode == "RGB"


@pytest.mark.parametrize("text", ["<image>\nWhat?", "What?\n<image>", "  <image> What? <image>", "What?"])
def test_the_image_tag_is_removed_wherever_it_stands(tmp_path: Path, text: str) -> None:
    assert load_examples(write(tmp_path, [record(text)]))[0].question == "What?"


def test_a_record_without_image_is_text_only_and_null_is_none(tmp_path: Path) -> None:
    assert [row.image for row in load_examples(write(tmp_path, [record(), record(image=None)]))] == [None, None]


def test_a_suffix_ends_every_question(tmp_path: Path) -> None:
    assert load_examples(write(tmp_path, [record()]), suffix="One word.")[0].question == "What?\nOne word."


def test_json_lines_bom_and_separators_inside_text_are_read(tmp_path: Path) -> None:
    lines = "\n\n".join(json.dumps(record(answer=f"a\u2028{n}"), ensure_ascii=False) for n in range(3)) + "\r\n"
    assert [row.answer for row in load_examples(write(tmp_path, lines, "x.jsonl"))] == [f"a\u2028{n}" for n in range(3)]
    array = b"\xef\xbb\xbf" + json.dumps([record()]).encode()
    assert len(load_examples(write(tmp_path, array))) == 1


def test_ids_are_unique_whatever_the_file_says(tmp_path: Path) -> None:
    rows = [record(id=name) for name in ("5", "a", "a", 7, True, None, "", [1])] + [record()]
    ids = [row.id for row in load_examples(write(tmp_path, rows))]
    assert ids == ["5", "a", "3", "7", "5-", "6", "7-", "8", "9"]


TURNS = [("system", "Be brief."), ("human", "<image>A?"), ("gpt", "a"), ("user", "B?"), ("assistant", "b")]
TALK = {"id": "r", "conversations": [{"from": who, "value": text} for who, text in [*TURNS, ("human", "left open")]]}


def test_a_conversation_is_one_training_example_with_all_its_answers(tmp_path: Path) -> None:
    found = Found()
    (row,) = load_file(write(tmp_path, [TALK]), Reading(suffix="One word."), found)
    assert (row.id, row.question, row.answer) == ("r", "A?\nOne word.", "a")
    assert row.more == (("B?\nOne word.", "b"),)
    assert "2 turns ignored" in found.notes[0]


def test_every_answered_question_of_a_conversation_is_scored(tmp_path: Path) -> None:
    rows = load_examples(write(tmp_path, [TALK, record(id="s")]), whole=False)
    assert [(row.id, row.question, row.answer) for row in rows] == [
        ("r#1", "A?", "a"),
        ("r#2", "B?", "b"),
        ("s", "What?", "red"),
    ]


@pytest.mark.parametrize("order", ["sorted", "in turns"])
def test_a_limit_keeps_classes_balanced(order: str) -> None:
    answers = [n % 10 if order == "in turns" else n // 100 for n in range(1000)]
    chosen = [answers[row] for row in spread(1000, 200)]
    assert min(chosen.count(answer) for answer in range(10)) >= 8


@pytest.mark.parametrize(("n", "limit"), [(10, 3), (7, 7), (7, 9), (1, 1), (1000, 999), (5, None)])
def test_spread_gives_distinct_ascending_indices(n: int, limit: int | None) -> None:
    chosen = spread(n, limit)
    assert len(chosen) == min(n, limit or n)
    assert chosen == sorted(set(chosen))
    assert all(0 <= index < n for index in chosen)


GOOD = json.dumps([record(id="a")])
ONE = json.dumps(record())
BROKEN = {
    "empty file": ("", "must hold a JSON array of records, got an empty file"),
    "white space": (" \n ", "got an empty file"),
    "empty array": ("[]", "must hold at least one record"),
    "mapping": (ONE, r"must hold a JSON array of records .* got '{"),
    "cut in a record": (f"[{ONE}, {ONE[:30]}", "record 2: must be JSON"),
    "cut after a comma": (f"[{ONE},", "record 2: must be JSON: .*truncated"),
    "cut after a record": (f"[{ONE}", "record 1: must be followed by .* truncated"),
    "cut after the bracket": ("[", "record 1: must be JSON: .*truncated"),
    "no comma": (f"[{ONE} {ONE}]", "record 1: must be followed by ',' or ']'"),
    "more after the end": (f"{GOOD} {GOOD}", "record 1: must be the last"),
    "NUL byte": (b"[" + ONE[:20].encode() + b"\0" + ONE[20:].encode() + b"]", "record 1: must be JSON"),
    "NUL bytes only": (b"\0" * 50, "must hold a JSON array"),
    "NUL escaped": ([record("a\0b")], r"record 1: turn 1: value must be Unicode text without NUL"),
    "half a surrogate": (r"[" + ONE.replace("red", r"\ud800") + "]", "record 1: turn 2: value must be Unicode text"),
    "invalid UTF-8": (b"[" + ONE.encode() + b"," + ONE.replace("red", "r@d").encode().replace(b"@", b"\xff") + b"]",
                      r"record 2: must be UTF-8 text, got b'\\xffd"),
    "invalid UTF-8 after a BOM": (b"\xef\xbb\xbf[\xff]", r"record 1: must be UTF-8 text, .* at byte 4"),
    "UTF-16": (GOOD.encode("utf-16"), "record 1: must be UTF-8 text"),
    "deep nesting": ("[" * 100_000, "record 1: must not be nested that deeply"),
    "deep mapping": ('[{"a":' + '{"a":' * 100_000, "record 1: must not be nested that deeply"),
    "long number": ("[" + "9" * 10_000 + "]", "record 1: must be JSON"),
    "record is a text": (["x"], "record 1 must be a mapping, got 'x'"),
    "record is null": ([record(), None], "record 2 must be a mapping, got None"),
    "no conversations": ([{"id": "a"}], "record 1: conversations must be a list of turns, got None"),
    "conversations is a text": ([{"conversations": "hi"}], "conversations must be a list of turns, got 'hi'"),
    "conversations is empty": ([{"conversations": []}], "must hold a human turn followed by a gpt turn"),
    "turn is a list": ([{"conversations": [[]]}], "record 1: turn 1 must be a mapping"),
    "turn without value": ([{"conversations": [{"from": "human"}]}], "record 1: turn 1: value must be a text"),
    "turn without from": ([{"conversations": [{"value": "a"}]}], "record 1: turn 1: from must be human or gpt"),
    "value is a number": ([record(5)], "record 1: turn 1: value must be a text, got 5"),  # type: ignore[arg-type]
    "nobody answers": ([{"conversations": [{"from": "human", "value": "a"}]}], "followed by a gpt turn, got 'human'"),
    "empty question": ([record("<image>\n ")], "record 1: question .* must not be empty"),
    "empty answer": ([record(answer=" ")], "record 1: answer must not be empty"),
    "image is a list": ([record(image=["1.png"])], "record 1: image must be a path, got a list of 1"),
    "image leaves its folder": ([record(image="1.png"), record(image="../train.json")], "record 2: image must"),
    "image is absolute": ([record(image="/etc/passwd")], "record 1: image must be a relative path"),
    "images missing": ([record(image=f"{n}.png") for n in range(9)],
                       r"7 images are missing: '0.png' \(train.json: record 1\), '3.png' \(train.json: record 4\), .*, \.\.\.$"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_whatever_is_wrong_is_one_message_with_file_record_and_rule(folder: Path, case: str) -> None:
    content, message = BROKEN[case]
    path = write(folder, content)
    with pytest.raises(BadInput, match=message) as caught:
        load_examples(path, folder / "images")
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < 600


def test_other_bad_calls_are_refused(folder: Path) -> None:
    with pytest.raises(BadInput, match=r"gone.json: no such file"):
        load_examples(folder / "gone.json")
    with pytest.raises(BadInput, match="no such file"):
        load_examples(folder)
    with pytest.raises(BadInput, match=r"record 1: the task must name its images .* got image '1.png'"):
        load_examples(write(folder, [record(image="1.png")]))
    with pytest.raises(BadInput, match="record 2: must be one JSON value a line"):
        load_examples(write(folder, f"{ONE}\n{ONE} {ONE}", "x.jsonl"))


def test_a_file_cut_anywhere_is_never_a_traceback(folder: Path) -> None:
    text = json.dumps([record(id="a", image="1.png"), record("Ünï?", id="b")], ensure_ascii=False).encode()
    for end in range(len(text)):
        with pytest.raises(BadInput, match=r"train.json: "):
            load_examples(write(folder, text[:end]), folder / "images")
