"""A JSON file is read in windows: whatever their size, records, places and messages are the same."""

import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedstrata.core.errors import BadInput
from fedstrata.scenarios import jsonfile
from fedstrata.scenarios.jsonfile import brief, parse, read_records, scan

VALUES: list[Any] = [
    {"a": "Ünï €uro 😀 \u2028", "b": [1, 2.5, -3e-7, True, None]},
    {},
    {"long": "x" * 3000, "quote": 'say "\\" and \\u0041'},
    {"deep": {"er": [[[{"": ""}]]]}},
    1.5,
    -12345678901234567890,
    "text with ] and , and }",
    [1, [2]],
    None,
    True,
]


def write(folder: Path, data: bytes | str, name: str = "x.json") -> Path:
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder / name


@pytest.fixture(params=[1, 2, 3, 7, 64, 2**20])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(jsonfile, "CHUNK", request.param)
    return int(request.param)


@pytest.mark.parametrize("style", ["plain", "ascii", "indented", "spaced", "bom"])
@pytest.mark.usefixtures("chunk")
def test_an_array_gives_its_values_and_their_places(tmp_path: Path, style: str) -> None:
    text = json.dumps(VALUES, ensure_ascii=style == "ascii", indent=3 if style == "indented" else None)
    text = text.replace(", {", " \r\n\t , \n\n {") + "\n \n" if style == "spaced" else text
    data = (b"\xef\xbb\xbf" if style == "bom" else b"") + text.encode()
    records = list(scan(write(tmp_path, data)))
    assert [record.value for record in records] == VALUES
    assert [parse(data[record.start : record.start + record.length]) for record in records] == VALUES


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_lines_give_their_values_and_their_places(tmp_path: Path, bom: bytes) -> None:
    data = bom + b"\n \r\n".join(b"  " + json.dumps(value, ensure_ascii=False).encode() + b"\t" for value in VALUES)
    records = list(scan(write(tmp_path, data, "x.JSONL")))
    assert [record.value for record in records] == VALUES
    assert [parse(data[record.start : record.start + record.length]) for record in records] == VALUES


@pytest.mark.usefixtures("chunk")
def test_random_files_are_read_as_the_json_module_reads_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        picks = [VALUES[rng.integers(len(VALUES))] for _ in range(rng.integers(5))]
        text = json.dumps(picks, ensure_ascii=bool(rng.integers(2)), indent=[None, 1][rng.integers(2)])
        assert list(read_records(write(tmp_path, text))) == picks


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)  # no halves of surrogate pairs: no UTF-8
NUMBER = st.integers() | st.floats(allow_nan=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
SPACE = st.text(" \t\r\n", max_size=20)


@settings(deadline=None, max_examples=200)
@given(
    values=st.lists(JSON, max_size=5),
    ascii_=st.booleans(),
    bom=st.booleans(),
    spaces=st.lists(SPACE, min_size=4, max_size=4),
)
@example(values=[1.5, -2e-7, 1e300, -0.0], ascii_=True, bom=False, spaces=[""] * 4)
@example(values=["\ufeff", "\U0001f600\u2028", '\\"\\\\', "\\u00e9"], ascii_=True, bom=True, spaces=["\n"] * 4)
@example(values=[True, False, None, {"": {"": []}}], ascii_=False, bom=False, spaces=[" " * 20] * 4)
def test_a_cut_anywhere_changes_neither_value_nor_place(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], ascii_: bool, bom: bool, spaces: list[str]
) -> None:
    texts = [json.dumps(value, ensure_ascii=ascii_) for value in values]
    before, after, between, around = spaces
    text = around + "[" + before + f"{after},{between}".join(texts) + before + "]" + around
    data = b"\xef\xbb\xbf" * bom + text.encode()
    path = write(tmp_path_factory.getbasetemp(), data, "any.json")
    with pytest.MonkeyPatch.context() as patch:
        for size in (1, 2, 3, 5, 16, 17, 64):
            patch.setattr(jsonfile, "CHUNK", size)
            records = list(scan(path))
            assert repr([record.value for record in records]) == repr(json.loads(text))
            assert [data[record.start :][: record.length].decode() for record in records] == texts


@settings(deadline=None)
@given(
    values=st.lists(JSON, min_size=1, max_size=5), ends=st.sampled_from(["\n", "\r\n", "\n\n \n"]), last=st.booleans()
)
def test_lines_are_read_as_the_json_module_reads_them(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], ends: str, last: bool
) -> None:
    texts = [json.dumps(value, ensure_ascii=False) for value in values]
    data = (ends.join(texts) + ends * last).encode()
    records = list(scan(write(tmp_path_factory.getbasetemp(), data, "any.jsonl")))
    assert repr([record.value for record in records]) == repr([json.loads(text) for text in texts])
    assert [data[record.start :][: record.length].decode() for record in records] == texts


SMALL = '[{"é": "\\u00e9\\n😀", "n": [-1.5e+3, true, null]}, 12.25, "]"]'.encode()


@pytest.mark.usefixtures("chunk")
def test_a_file_that_ends_too_early_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    for end in range(len(SMALL)):
        with pytest.raises(BadInput, match=r"x.json: (record [123]: must be|must hold a JSON array)"):
            list(scan(write(tmp_path, SMALL[:end])))
    assert list(read_records(write(tmp_path, SMALL))) == json.loads(SMALL)


def test_a_byte_that_is_no_text_is_told_alike_whatever_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it comes: the byte itself, or the first of a letter that it cuts."""
    for at in range(1, len(SMALL)):
        path = write(tmp_path, SMALL[:at] + b"\xff" + SMALL[at:])
        messages = set()
        for size in (1, 2, 3, 7, 64, 2**20):
            monkeypatch.setattr(jsonfile, "CHUNK", size)
            with pytest.raises(BadInput, match="must be UTF-8 text") as caught:
                list(scan(path))
            place = int(str(caught.value).rpartition(" ")[2])
            assert place <= at < place + 4
            assert SMALL[place:at] == b"" or SMALL[place] >= 0xC0
            messages.add(str(caught.value).partition(", got ")[0] + str(place))
        assert len(messages) == 1


GOOD = '{"a": "é"}'
BROKEN = {
    "empty": ("", "must hold a JSON array of records, got an empty file"),
    "spaces": (" \n" * 50, "got an empty file"),
    "bom": (b"\xef\xbb\xbf", "got an empty file"),
    "mapping": (GOOD, r"must hold a JSON array of records \(or be named .jsonl\), got '{"),
    "cut after comma": (f"[{GOOD},", "record 2: must be JSON: .* is it truncated"),
    "cut in key": (f'[{GOOD},{{"a', "record 2: must be JSON: Unterminated .* is it truncated"),
    "cut in number": ("[1, 2", "record 2: must be followed by .* truncated"),
    "cut after value": (f"[{GOOD}", "record 1: must be followed by ',' or ']', but the file ends: is it truncated"),
    "no comma": (f"[{GOOD} {GOOD}]", "record 1: must be followed by ',' or ']', got '{"),
    "comma at the end": (f"[{GOOD},]", "record 2: must be JSON"),
    "more after it": (f"[{GOOD}] [", "record 1: must be the last before the end of the file, got '\\['"),
    "single quotes": (f"[{GOOD},{{'a': 1}}]", "record 2: must be JSON: Expecting property name"),
    "a key twice": (f'[{GOOD},{{"a": 1, "b": 2, "a": 3}}]', "record 2: must not have a key twice, got 'a' again"),
    "a key twice inside": ('[{"a": [{"b": 1, "b": 1}]}]', "record 1: must not have a key twice, got 'b' again"),
    "NUL": (f"[{GOOD},\0]", "record 2: must be JSON"),
    "control character": ('[{"a": "\n"}]', "record 1: must be JSON: Invalid control character"),
    "bad escape": ('[{"a": "\\u12x4"}]', "record 1: must be JSON: Invalid .* escape"),
    "no UTF-8": (f"[{GOOD},".encode() + b'{"a": "\xff"}]', r"record 2: must be UTF-8 text, got b'\\xff.*' at byte 20"),
    "no UTF-8 between": (f"[{GOOD}".encode() + b"\xfe]", r"record 1: must be UTF-8 text, got b'\\xfe.*' at byte 12"),
    "no UTF-8 after": (f"[{GOOD}]".encode() + b"\xfe", r"record 1: must be UTF-8 text"),
    "UTF-8 cut": (f"[{GOOD}".encode()[:9], r"record 1: must be UTF-8 text, got b'\\xc3' at byte 8"),
    "UTF-16": (GOOD.encode("utf-16"), "record 1: must be UTF-8 text"),
    "deep": ("[" * 200_000, "record 1: must not be nested that deeply"),
    "long number": ("[" + "9" * 10_000 + "]", "record 1: must be JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.usefixtures("chunk")
def test_whatever_is_wrong_is_one_message_whatever_the_window(tmp_path: Path, case: str) -> None:
    data, message = BROKEN[case]
    path = write(tmp_path, data)
    with pytest.raises(BadInput, match=message) as caught:
        list(scan(path))
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (f"{GOOD}\n{GOOD} {GOOD}", "record 2: must be one JSON value a line, got ' {"),
        (f"{GOOD}\n\n{GOOD[:-1]}\n{GOOD}", "record 2: must be JSON"),
        (f"{GOOD}\n".encode() + b"\n\xff\n", r"record 2: must be UTF-8 text, got b'\\xff' at byte 13"),
        (b"\xef\xbb\xbf \xff", r"record 1: must be UTF-8 text, got b'\\xff' at byte 4"),
        ('{"a": 1, "a": 2}', "record 1: must not have a key twice"),
        ("\n \n", "got an empty file"),
    ],
)
def test_whatever_is_wrong_with_lines_is_one_message(tmp_path: Path, data: bytes | str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        list(scan(write(tmp_path, data, "x.jsonl")))


def test_long_records_take_linear_time_and_files_little_memory(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps([{"a": "é" * 5_000_000}, {"b": ["x" * 40] * 300_000}]))
    began = time.process_time()
    assert [len(next(iter(value.values()))) for value in read_records(path)] == [5_000_000, 300_000]
    assert time.process_time() - began < 10
    path = write(tmp_path, json.dumps([{"a": f"{n} " + "x" * 200} for n in range(60_000)]))
    tracemalloc.start()
    assert sum(1 for _ in scan(path)) == 60_000
    assert tracemalloc.get_traced_memory()[1] < 6 * jsonfile.CHUNK < path.stat().st_size
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_a_record_that_never_ends_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonfile, "MOST_BYTES", 1000)
    monkeypatch.setattr(jsonfile, "CHUNK", 100)
    with pytest.raises(BadInput, match="record 1: must have at most 1,000 bytes"):
        list(scan(write(tmp_path, '[{"a": "' + "x" * 9000, name)))


@pytest.mark.parametrize("chunk", [1, 50, 2**20])
@pytest.mark.parametrize("end", ["", "\n", "\r\n", " \n"])
def test_the_longest_record_is_the_longest_whatever_stands_around_it(
    tmp_path: Path, chunk: int, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonfile, "CHUNK", chunk)
    record = json.dumps({"a": "é" * 60}, ensure_ascii=False)
    lines = write(tmp_path, f"{record}{end or chr(10)}{record}{end}", "x.jsonl")
    for path in (lines, write(tmp_path, f"[{record}{end},{record}{end}]")):
        monkeypatch.setattr(jsonfile, "MOST_BYTES", len(record.encode()))
        assert len(list(scan(path))) == 2
        monkeypatch.setattr(jsonfile, "MOST_BYTES", len(record.encode()) - 1)
        with pytest.raises(BadInput, match="record 1: must have at most 128 bytes"):
            list(scan(path))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone.json"):
        with pytest.raises(BadInput, match="no such file"):
            list(scan(path))


def test_what_came_is_told_briefly() -> None:
    assert [brief(value) for value in ({}, [1], "x" * 99, 5)] == [
        "a dict of 0",
        "a list of 1",
        repr("x" * 60) + "...",
        "5",
    ]
