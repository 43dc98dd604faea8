"""Instruction files: good ones give rows, bad ones one message with file, record and rule."""

import json
import multiprocessing
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedstrata.core.errors import BadInput
from fedstrata.scenarios import jsonfile, tasks
from fedstrata.scenarios.example import Example
from fedstrata.scenarios.files import Found, Reading, load_file, refuse_missing
from fedstrata.scenarios.images import open_images
from fedstrata.scenarios.rows import Joined, Rows
from fedstrata.scenarios.tasks import hold_out, spread, vocabulary


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


@pytest.mark.parametrize(
    ("given_ids", "ids"),
    [
        ([None] * 4, ["1", "2", "3", "4"]),
        (["x"] * 4, ["x", "2", "3", "4"]),
        (["3", "3", None], ["3", "2", "3-"]),
        (["2", "2", "2-"], ["2", "2--", "2-"]),
        ([1, "1", 1.0, 2], ["1", "2-", "3", "2"]),
        (["ü", "u\u0308", ""], ["ü", "u\u0308", "3"]),
    ],
)
def test_ids_that_are_missing_or_taken_become_record_numbers(
    tmp_path: Path, given_ids: list[Any], ids: list[str]
) -> None:
    assert [row.id for row in load(write(tmp_path, [record(id=given) for given in given_ids]))] == ids


def test_a_record_may_not_be_called_like_a_turn_of_another(tmp_path: Path) -> None:
    rows = [TALK, record(id="r#1"), {**TALK, "id": None}, record(id="3#2"), record(id="r#")]
    ids = [row.id for row in load(write(tmp_path, rows), whole=False)]
    assert ids == ["r#1", "r#2", "2", "3#1", "3#2", "4", "r#"]
    assert [row.id for row in load(write(tmp_path, rows))] == ["r", "r#1", "3", "3#2", "r#"]


NAMES = st.sampled_from([None, 1, "1", "2", "3", "2-", "a", "a#1", "a#2", "1#1", "2#1", "a#1#1"])


@settings(deadline=None)
@given(records=st.lists(st.tuples(NAMES, st.integers(1, 3)), min_size=1, max_size=7), whole=st.booleans())
def test_no_two_rows_have_one_id(
    tmp_path_factory: pytest.TempPathFactory, records: list[tuple[Any, int]], whole: bool
) -> None:
    content = [{"id": name, "conversations": record()["conversations"] * turns} for name, turns in records]
    path = tmp_path_factory.getbasetemp() / "ids.json"
    path.write_text(json.dumps(content))
    rows = load(path, whole=whole)
    ids = [row.id for row in rows]
    assert len(set(ids)) == len(ids) == len(np.unique(rows.marks.content, axis=0))


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
                       r"7 images are missing: '0.png' \(train.json: record 1\), '3.png' .*record 4\), .*, \.\.\.$"),
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


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "x" * 5000 + "/y", "gone/x.json"])
def test_names_that_no_file_can_have_are_refused(tmp_path: Path, name: str) -> None:
    for call in (load, open_images):
        for end in (".json", ".zip"):
            with pytest.raises(BadInput, match=r"no such|not a readable"):
                call(tmp_path / (name + end))


# --- rows are read again when they are asked for

FORMS: dict[str, list[dict[str, Any]]] = {
    "llava": [TALK, record("Ünï €?", id="a", image="1.png"), record(image="./2.png")],
    "fcit": [{"question_id": n, "text": f"<image>\n{n}?", "answer": f"ä{n}", "image": "1.png"} for n in range(3)],
    "alpaca": [{"instruction": "Add", "input": more, "output": "3"} for more in ("1 2", "", "x" * 3000)],
    "trace": [{"prompt": f"{n} \u2028 ?", "answer": n / 2} for n in range(3)],
}


def built(content: list[dict[str, Any]], reading: Reading) -> list[Example]:
    """What the rows must be, from records in memory; each record has its own id or none."""
    rows: list[Example] = []
    for number, row in enumerate(content, 1):
        parsed = reading.parse(row, "")
        base = str(number) if parsed.id is None else str(parsed.id)
        rows += reading.examples(parsed, base, reading.picture(parsed, ""))
    return rows


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_a_row_read_later_is_the_row_that_was_checked(folder: Path, form: str, whole: bool, name: str) -> None:
    content = FORMS[form]
    lines = [json.dumps(row, ensure_ascii=number == 1) for number, row in enumerate(content)]
    path = write(folder, "\n".join(lines) if name == "x.jsonl" else f"[{', '.join(lines)}]", name)
    reading = Reading(images=open_images(folder / "images"), whole=whole, suffix="One word.")
    rows, wanted = load_file(path, reading, Found()), built(content, reading)
    assert list(rows) == wanted
    assert [rows[row] for row in reversed(range(len(rows)))] == wanted[::-1]
    assert list(rows[1:]) == list(rows.take(range(1, len(rows)))) == wanted[1:]
    assert rows[-1] == wanted[-1]


def test_files_joined_are_read_from_the_right_one(tmp_path: Path) -> None:
    parts = [load(write(tmp_path, [record(f"{name}{n}?") for n in range(3)], f"{name}.json")) for name in "abc"]
    rows = Joined(parts)
    assert [row.question for row in rows] == [f"{name}{n}?" for name in "abc" for n in range(3)]
    assert [row.question for row in rows[::4]] == ["a0?", "b1?", "c2?"]
    assert (rows[-1].question, rows[3].question) == ("c2?", "b0?")
    assert np.array_equal(rows.marks.asked, np.concatenate([part.marks.asked for part in parts]))


def test_more_files_than_may_be_open_at_once_are_read(tmp_path: Path) -> None:
    rows = Joined([load(write(tmp_path, [record(f"{n}?")], f"{n}.json")) for n in range(300)])
    for _ in range(2):
        assert [row.question for row in rows] == [f"{n}?" for n in range(300)]


def first_questions(rows: Rows, asked: Any) -> None:
    asked.put([row.question for row in rows])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_reads_and_so_does_its_parent(tmp_path: Path) -> None:
    rows = load(write(tmp_path, [record(f"{n}?") for n in range(50)]))
    wanted = [row.question for row in rows]
    context = multiprocessing.get_context("fork")
    asked = context.SimpleQueue()
    children = [context.Process(target=first_questions, args=(rows, asked)) for _ in range(2)]
    for child in children:
        child.start()
    assert [row.question for row in rows] == wanted
    assert [asked.get() for _ in children] == [wanted, wanted]
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert rows[7].question == "7?"


def test_a_record_too_deep_for_where_it_is_read_is_no_traceback(tmp_path: Path) -> None:
    def below(rows: Rows, depth: int) -> Example:
        return rows[0] if depth == 0 else below(rows, depth - 1)

    told = set()
    for depth in range(600, 1000, 20):
        path = write(tmp_path, '[{"prompt": "a", "answer": "b", "x": ' + "[" * depth + "]" * depth + "}]")
        try:
            told.add(below(load(path, format="trace"), 300).answer)
        except BadInput as error:
            told.add(str(error))
    assert told == {"b", f"{path}: record 1: must not be nested that deeply"}


# --- marks


def test_marks_are_equal_exactly_where_contents_are(folder: Path) -> None:
    content = [record(id="a", image="1.png"), record(id="b", image="1.png"), record(id="c", image="2.png")]
    content += [record("Who?", id="d", image="1.png"), record(answer="blue", id="e", image="1.png"), record(id="f")]
    marks = load(write(folder, content), folder / "images").marks
    assert len(np.unique(marks.content, axis=0)) == 6  # ids differ
    assert [(marks.asked == mark).sum() for mark in marks.asked] == [3, 3, 1, 1, 3, 1]
    assert [(marks.answer == mark).sum() for mark in marks.answer] == [5, 5, 5, 5, 1, 5]
    again = load(write(folder, content, "again.json"), folder / "images").marks
    assert np.array_equal(again.content, marks.content)


def test_the_digest_knows_no_folder_no_window_and_no_container(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = [TALK, record(id="a", image="1.png"), record("Ünï?", image="./2.png")]

    def digest(place: Path, name: str, images: str = "images") -> str:
        path = write(place, "\n".join(map(json.dumps, content)) if name.endswith("l") else content, name)
        return load(path, place / images).marks.digest

    elsewhere = folder / "else/where"
    shutil.copytree(folder / "images", elsewhere / "pictures")
    wanted = digest(folder, "x.json")
    assert wanted == digest(folder, "x.jsonl") == digest(elsewhere, "y.json", "pictures")
    for size in (1, 7, 100):
        monkeypatch.setattr(jsonfile, "CHUNK", size)
        assert digest(folder, "x.json") == wanted
    content[1]["id"] = "other"
    assert digest(folder, "x.json") != wanted


# --- which rows


@pytest.mark.parametrize(
    ("reading", "ids"),
    [
        ({"where": {"kind": "vqa"}}, "abd"),
        ({"where": {"kind": "vqa", "hard": "true"}}, "a"),
        ({"where": {"level": "3"}}, "c"),
        ({"answers": frozenset({"red"})}, "ac"),
        ({"answers": frozenset({"red", "blue"}), "where": {"kind": "vqa"}}, "ab"),
    ],
)
def test_filters_keep_the_rows_that_they_name(tmp_path: Path, reading: dict[str, Any], ids: str) -> None:
    content = [
        record(id="a", kind="vqa", hard=True),
        record(id="b", kind="vqa", answer="blue", level=None),
        record(id="c", kind="text", level=3),
        record(id="d", kind="vqa", answer="green"),
    ]
    rows = load(write(tmp_path, content), **reading)
    assert "".join(row.id for row in rows) == ids
    assert len(rows.marks.asked) == len(ids)


@pytest.mark.parametrize(
    ("reading", "message"),
    [
        ({"where": {"kind": "none"}}, r"train.json: no row is left by where {'kind': 'none'}$"),
        ({"answers": frozenset({"up", "down"})}, r"train.json: no row is left by answers \['down', 'up'\]$"),
        ({"where": {"kind": "vqa"}, "answers": frozenset({"up"})}, r"left by where {'kind': 'vqa'} and answers \['up'"),
    ],
)
def test_filters_that_leave_nothing_are_named(tmp_path: Path, reading: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        load(write(tmp_path, [record(kind="vqa")]), **reading)


def test_what_a_filter_drops_must_be_right_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="record 2: turn 2: value must be a text"):
        load(write(tmp_path, [record(kind="a"), record(answer=None, kind="b")]), where={"kind": "a"})  # type: ignore[arg-type]


def longer(row: Any) -> str:
    return "long" if len(row["who"]) > 2 else "short"


@pytest.mark.parametrize(("source", "groups"), [("who", [0, 1, 0, 2]), (longer, [0, 1, 0, 1])])
def test_a_source_is_a_field_or_a_function(tmp_path: Path, source: str | Callable[..., str], groups: list[int]) -> None:
    content = [record(who=who) for who in ("me", "you", "me", "they")]
    marks = load(write(tmp_path, content), source=source).marks
    assert marks.source is not None
    alike = marks.source[:, None] == marks.source[None]
    assert np.array_equal(alike, np.equal.outer(groups, groups))


@pytest.mark.parametrize("more", [{}, {"who": None}])
def test_a_record_without_the_source_field_is_refused(tmp_path: Path, more: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="record 2: must have the field who that the partition names, got the keys 'con"):
        load(write(tmp_path, [record(who="me"), record(**more)]), source="who")


def test_a_task_with_too_many_answers_has_no_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [
        load(write(tmp_path, [record(answer=answer) for answer in text], f"{text}.json")) for text in ("aab", "bc")
    ]
    assert vocabulary(parts) == {"a", "b", "c"}
    for most, words in ((3, {"a", "b", "c"}), (2, None), (1, None)):
        monkeypatch.setattr(tasks, "MOST_ANSWERS", most)
        assert vocabulary(parts) == words


@settings(deadline=None)
@given(
    asked=st.lists(st.integers(0, 30), min_size=1, max_size=80),
    limit=st.none() | st.integers(1, 90),
)
def test_no_question_is_trained_and_held_out(asked: list[int], limit: int | None) -> None:
    marks = np.array(asked, dtype=np.uint64)
    train, val = hold_out(marks, limit)
    assert not set(marks[train].tolist()) & set(marks[val].tolist())
    assert len(train) >= 1
    assert len(val) <= max(1, len(asked) // 10)
    for rows in (train, val):
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert all(0 <= row < len(asked) for row in rows)
    assert limit is None or len(train) <= limit
    assert len(val) or len(set(asked)) == 1 or limit is not None
