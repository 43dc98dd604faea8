"""Rows are read when asked for; their marks stand for their texts, the same wherever the rows lie."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from fedstrata.scenarios.example import Example
from fedstrata.scenarios.files import Found, Reading, load_file
from fedstrata.scenarios.images import ImageFile
from fedstrata.scenarios.rows import Joined, Listed, Rows, hash_texts, rows_of

EXAMPLES = [Example(str(n), f"What is {n}?", "even" if n % 2 == 0 else "odd") for n in range(7)]


def from_file(folder: Path, source: str | None = None) -> Rows:
    records = [{"id": row.id, "prompt": row.question, "answer": row.answer, "who": row.answer} for row in EXAMPLES]
    (folder / "x.json").write_text(json.dumps(records))
    return load_file(folder / "x.json", Reading(source=source), Found())


@pytest.fixture(params=["listed", "file", "joined", "taken"])
def rows(request: pytest.FixtureRequest, tmp_path: Path) -> Rows:
    made: dict[str, Rows] = {
        "listed": rows_of(EXAMPLES),
        "file": from_file(tmp_path),
        "joined": Joined([rows_of(EXAMPLES[:2]), rows_of([]), rows_of(EXAMPLES[2:])]),
        "taken": rows_of([*EXAMPLES, *EXAMPLES]).take(np.arange(7, 14)),
    }
    return made[str(request.param)]


def test_rows_are_a_sequence(rows: Rows) -> None:
    assert len(rows) == 7
    assert list(rows) == EXAMPLES
    assert (rows[0], rows[-1], rows[np.int64(3)]) == (EXAMPLES[0], EXAMPLES[6], EXAMPLES[3])
    assert list(rows[1:6:2]) == EXAMPLES[1:6:2]
    assert list(rows[::-1]) == EXAMPLES[::-1]
    assert EXAMPLES[4] in rows
    for index in (7, -8):
        with pytest.raises(IndexError):
            rows[index]
    assert rows_of(rows) is rows


def test_rows_taken_may_repeat_and_be_taken_again(rows: Rows) -> None:
    some = rows.take([6, 0, 0, 3])
    assert [row.id for row in some] == ["6", "0", "0", "3"]
    assert [row.id for row in some.take(np.array([3, 0]))] == ["3", "6"]
    assert np.array_equal(some.marks.asked, rows.marks.asked[[6, 0, 0, 3]])
    assert len(rows.take([])) == len(rows.take([]).marks.answer) == 0


def test_marks_stand_for_texts(rows: Rows) -> None:
    marks = rows.marks
    assert len(np.unique(marks.content)) == 14
    assert len(np.unique(marks.asked)) == 7
    assert len(np.unique(marks.answer)) == 2
    assert marks.answer[0] == int.from_bytes(hash_texts("even"), "little")
    assert marks.source is None
    same = rows_of(EXAMPLES).marks
    assert np.array_equal(same.asked, marks.asked)
    assert np.array_equal(same.answer, marks.answer)
    assert len(marks.digest) == 64
    assert marks.digest == rows.take(range(7)).marks.digest != rows.take([1, 0, *range(2, 7)]).marks.digest


def test_sources_are_marked_where_they_are_asked_for(tmp_path: Path) -> None:
    rows = from_file(tmp_path, "who")
    assert np.array_equal(rows.marks.source, rows.marks.answer)
    assert np.array_equal(rows.take([3, 4]).marks.source, rows.marks.answer[3:5])
    assert Joined([rows, rows]).marks.source is not None
    assert Joined([rows, rows_of(EXAMPLES)]).marks.source is None


def test_every_field_counts_in_the_content() -> None:
    example = Example("a", "b", "c", ImageFile("/here", "1.png"), (("d", "e"),), ("f",))
    changed = [dataclasses.replace(example, **{key: "x"}) for key in ("id", "question", "answer")]
    changed += [dataclasses.replace(example, image=image) for image in (None, ImageFile("/here", "2.png"))]
    changed += [dataclasses.replace(example, more=more) for more in ((), (("de", ""),), (("d", "e"), ("d", "e")))]
    changed += [dataclasses.replace(example, references=references) for references in ((), ("f", "f"), ("g",))]
    digests = {Listed([row]).marks.digest for row in [example, *changed]}
    assert len(digests) == 1 + len(changed)
    assert Listed([dataclasses.replace(example, image=ImageFile("/there", "1.png"))]).marks.digest in digests


def test_texts_do_not_run_into_each_other() -> None:
    assert len({hash_texts(*texts) for texts in (("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), ("", "abc"))}) == 5
