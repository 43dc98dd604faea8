"""Hundreds of damaged and hostile files: each loads to what it says, or is one `BadInput` with file, record and rule.

Never another exception, and never a byte from outside the folders that the task names.
"""

import json
import os
import re
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from fedstrata.core.errors import BadInput
from fedstrata.scenarios.example import Example
from fedstrata.scenarios.files import Found, Reading, load_file, refuse_missing
from fedstrata.scenarios.images import FolderImages, ZipImages, open_images

TAG = "<image>"
SECRET = (1, 2, 3)  # colour of the picture that nobody may read
FIELDS = {"question": "ask", "answer": "say"}
FORMATS = ("llava", "fcit", "alpaca", "trace", "fields", "auto")
CONTAINERS = ("json", "jsonl")
KEYS = {"fcit": ("text", "answer"), "alpaca": ("instruction", "output"), "trace": ("prompt", "answer")}
KEYS["fields"] = ("ask", "say")
READINGS: tuple[dict[str, Any], ...] = ({}, {"whole": False}, {"source": "kind"}, {"where": {"kind": "a"}})
PER_FILE = 55  # mutants of each form and container
Rng = np.random.Generator

# --- good records, and what they mean, told independently of the code under test


def good(form: str, n: int) -> dict[str, Any]:
    ask, say = f"{TAG}\nWhat is number {n}, ünï €?", f"answer {n}"
    more = {"id": [n, f"r{n}"][n % 2], "image": f"{n % 3}.png", "kind": "ab"[n % 2], "extra": {"x": [1, None]}}
    if form == "llava":
        said = [("human", ask), ("gpt", say), ("human", "And then?"), ("gpt", "more"), ("human", "open")][
            : 2 + 3 * (n % 2)
        ]
        return {"conversations": [{"from": who, "value": text} for who, text in said], **more}
    question, answer = KEYS[form]
    return {question: ask, answer: say, **({"input": ""} if form == "alpaca" else {}), **more}


def meant(form: str, record: dict[str, Any]) -> list[tuple[str, str]]:
    """(question, answer) of every turn."""
    if "conversations" in record and form in ("llava", "fcit", "auto"):
        said = [(turn["from"], turn["value"]) for turn in record["conversations"]]
        pairs = [(ask, say) for (who, ask), (to, say) in pairwise(said) if (who, to) == ("human", "gpt")]
        return [(ask.replace(TAG, "").strip(), say.strip()) for ask, say in pairs]
    form = next(name for name, (ask, _) in KEYS.items() if ask in record) if form == "auto" else form
    ask, say = (str(record[key]).replace(TAG, "").strip() for key in KEYS[form])
    more = str(record.get("input") or "").replace(TAG, "").strip() if form == "alpaca" else ""
    return [(f"{ask}\n{more}" if more else ask, say)]


def told(row: Example, whole: bool) -> list[tuple[str, str]]:
    return [(row.question, row.answer), *row.more] if whole else [(row.question, row.answer)]


# --- what can be wrong


def values(outside: Path) -> list[Any]:
    wrong: list[Any] = [None, True, 5, 0.5, [], {}, "", " \n", "\0", "a\0b", "\ud800", [["x"]], {"from": "human"}]
    return [*wrong, float("nan"), 10**30, TAG, "x" * 3000, *evil_names(outside)]


def evil_names(outside: Path) -> list[str]:
    names = ["../secret.png", "a/../../secret.png", "..\\secret.png", str(outside / "secret.png"), "/etc/passwd"]
    names += ["C:\\secret.png", "C:/secret.png", "\\\\server\\secret.png", "link.png", "linked/secret.png", "loop.png"]
    names += ["file://" + str(outside / "secret.png"), "~/secret.png", ".", "..", "a", "0.png/..", "0.png/x"]
    return [*names, "x" * 5000, "0.png\0", "bomb.png", "huge.png", "text.png", "empty.png", "cut.png", "gone.png"]


def spoil_record(record: dict[str, Any], rng: Rng, outside: Path) -> None:
    """Replaces, removes or renames something, at the top or in a turn."""
    wrong = values(outside)
    turns = record.get("conversations")
    place: Any = record
    if isinstance(turns, list) and turns and rng.random() < 0.5:
        place = turns if rng.random() < 0.3 else turns[rng.integers(len(turns))]
    if not isinstance(place, dict | list) or not place:  # spoilt already
        place = record
    keys = list(range(len(place))) if isinstance(place, list) else list(place)
    key, kind = keys[rng.integers(len(keys))], rng.integers(6)
    if kind == 0:
        del place[key]
    elif kind == 1 and "image" in record:
        record["image"] = wrong[rng.integers(len(wrong))]
    elif kind == 2 and isinstance(place, dict):
        place[f"{key}\ud800"] = place.pop(key)
    else:
        place[key] = wrong[rng.integers(len(wrong))]


def spoil_text(data: bytes, rng: Rng) -> bytes:
    at = int(rng.integers(len(data)))
    end = min(len(data), at + int(rng.integers(1, 40)))
    junk = [
        b"\0",
        b"\xff",
        b"\xc3",
        b"\xef\xbb\xbf",
        b"[" * 50_000,
        b'{"a":' * 50_000,
        b'"',
        b",",
        b"]",
        b"}",
        b"\\u12",
    ]
    junk += [b"9" * 6000, b"NaN", b"\xed\xa0\x80", bytes(rng.integers(0, 256, 8, dtype=np.uint8)), b"\n", b"//", b"'"]
    piece = junk[rng.integers(len(junk))]
    made: list[Callable[[], bytes]] = [
        lambda: data[:at],
        lambda: data[at:],
        lambda: data[:at] + data[end:],
        lambda: data[:at] + piece + data[at:],
        lambda: data[:at] + piece + data[end:],
        lambda: data[:end] + data[at:],
        lambda: b"\xef\xbb\xbf" + data,
        lambda: data + piece,
        lambda: re.sub(rb'"kind": "', b'"kind": "x", "kind": "', data, count=1),
        lambda: data.decode().encode(("utf-16", "utf-32", "latin-1", "utf-8")[rng.integers(4)], "replace"),
    ]
    return made[rng.integers(len(made))]()


def mutants(form: str, container: str, outside: Path) -> Iterator[bytes]:
    rng = np.random.default_rng([FORMATS.index(form), len(container), 1])
    for number in range(PER_FILE):
        records: list[Any] = [
            good(form if form != "auto" else FORMATS[n % 4], n) for n in range(int(rng.integers(1, 7)))
        ]
        if number and rng.random() < 0.6:
            for _ in range(rng.integers(1, 3)):
                spoil_record(records[rng.integers(len(records))], rng, outside)
        if number and rng.random() < 0.1:
            records[rng.integers(len(records))] = values(outside)[rng.integers(12)]
        lines = [json.dumps(record, ensure_ascii=bool(number % 3 == 0) or not _plain(record)) for record in records]
        text = "\n".join(lines) if container == "jsonl" else "[" + ",\n ".join(lines) + "]"
        yield spoil_text(text.encode(), rng) if number and rng.random() < 0.5 else text.encode()


def _plain(record: Any) -> bool:
    """Whether it can be UTF-8 without escapes."""
    return "\\ud800" not in json.dumps(record)


# --- the watch

_watched: list[str] | None = None


def _listen(event: str, words: tuple[Any, ...]) -> None:
    if _watched is not None and event == "open" and isinstance(words[0], str | bytes):
        _watched.append(os.fsdecode(words[0]))


sys.addaudithook(_listen)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The task's folder; `outside`, beside it, holds what nobody may open."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for place in (inside / "images" / "a", outside):
        place.mkdir(parents=True)
    for place in (outside, inside):  # one step up from the pictures lies a secret too
        Image.new("RGB", (4, 4), SECRET).save(place / "secret.png")
    fill(inside / "images")
    (inside / "images/link.png").symlink_to(outside / "secret.png")
    (inside / "images/linked").symlink_to(outside)
    (inside / "images/loop.png").symlink_to("loop.png")
    return inside


@pytest.fixture
def world(folder: Path) -> Iterator[Path]:
    """`folder`, watched: fails when anything outside it was opened."""
    global _watched
    Image.init()  # its plugins are files too
    _watched = []
    yield folder
    opened, _watched = [os.path.realpath(path) for path in _watched], None
    libraries = tuple(os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, Path(__file__).parents[2]))
    assert not [path for path in opened if not path.startswith((f"{folder}/", *libraries))]
    assert str(folder / "secret.png") not in opened


def fill(folder: Path) -> None:
    for n in range(3):
        Image.new("RGB", (4, 4), (200, n, 0)).save(folder / f"{n}.png")
    whole = (folder / "0.png").read_bytes()
    hostile = {"text.png": b"no image", "empty.png": b"", "cut.png": whole[:50], "bomb.png": png(9000)}
    for name, data in (hostile | {"huge.png": png(60_000)}).items():
        (folder / name).write_bytes(data)


def png(side: int) -> bytes:
    """A few bytes that claim to be side x side pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


def attempt(call: Callable[[], Any]) -> Any:
    """What it gives, or what is wrong; anything but `BadInput` fails the test."""
    try:
        return call()
    except BadInput as error:
        return str(error)


def read(path: Path, reading: Reading) -> list[Example] | str:
    found = Found()

    def whole() -> list[Example]:
        rows = load_file(path, reading, found)
        refuse_missing(found, str(path))
        return list(rows)

    done: list[Example] | str = attempt(whole)
    return done


def check_message(path: Path, message: str) -> None:
    assert message.startswith(f"{path}: ")
    assert re.search(r"record \d+|must hold a JSON array|must hold at least one|no row is left by where", message), (
        message
    )
    assert len(message) < 700
    message.encode()  # a terminal can show it


def open_pictures(rows: list[Example]) -> int:
    """How many can be opened; the others are refused by name."""
    opened = [attempt(row.image.open) for row in rows if row.image]
    for picture in opened:
        if isinstance(picture, str):
            assert re.search(r"(bomb|huge|text|empty|cut)\.png: (image must|not a readable)", picture), picture
        else:
            assert picture.getpixel((0, 0)) != SECRET
    return sum(not isinstance(picture, str) for picture in opened)


# --- the tests


def parsed(data: bytes, container: str) -> list[dict[str, Any]]:
    text = data.decode("utf-8-sig")
    lines = [line for line in text.split("\n") if line.strip()]
    found: list[dict[str, Any]] = [json.loads(line) for line in lines] if container == "jsonl" else json.loads(text)
    return found


def test_there_are_at_least_five_hundred_mutants() -> None:
    assert PER_FILE * len(FORMATS) * len(CONTAINERS) >= 500


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("form", FORMATS)
def test_a_mutated_file_loads_to_what_it_says_or_is_refused(world: Path, form: str, container: str) -> None:
    images, outcomes = open_images(world / "images"), []
    for number, data in enumerate(mutants(form, container, world.parent / "outside")):
        path = world / f"{number}.{container}"
        path.write_bytes(data)
        more = READINGS[number % len(READINGS)]
        result = read(
            path, Reading(**{"format": form, "images": images, "fields": FIELDS if form == "fields" else {}, **more})
        )
        outcomes.append(isinstance(result, str))
        if isinstance(result, str):
            check_message(path, result)
            continue
        wanted = [meant(form, row) for row in parsed(data, container) if "where" not in more or row.get("kind") == "a"]
        whole = more.get("whole", True)
        assert [told(row, whole) for row in result] == (wanted if whole else [[turn] for row in wanted for turn in row])
        assert len({row.id for row in result}) == len(result)
        open_pictures(result)
    assert outcomes[0] is False  # the first is not mutated
    assert 0.3 < np.mean(outcomes) < 0.95


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("store", ["folder", "zip"])
def test_no_name_leads_out_of_the_pictures(world: Path, store: str) -> None:
    if store == "zip":
        write_zip(world / "images.zip", world / "images")
    images = open_images(world / ("images.zip" if store == "zip" else "images"))
    for number, name in enumerate(evil_names(world.parent / "outside")):
        path = world / f"{number}.json"
        path.write_text(json.dumps([good("trace", 0), good("trace", 1) | {"image": name}]))
        result = read(path, Reading(images=images))
        if isinstance(result, str):
            check_message(path, result)
            assert "record 2" in result
        else:
            assert open_pictures(result) == 1
            assert name in ("bomb.png", "huge.png", "text.png", "empty.png", "cut.png")


def write_zip(path: Path, folder: Path) -> None:
    """With members that a careless extraction would write or read elsewhere."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.glob("*.png")):
            if not file.is_symlink():
                archive.write(file, file.name)
        for name in ("../secret.png", "/etc/passwd", "C:/secret.png", "a/../../secret.png"):
            archive.writestr(name, b"evil")
        archive.writestr("a/", b"")


def test_members_of_a_zip_are_never_links_and_never_larger_than_they_may_be(world: Path) -> None:
    outside = world.parent / "outside"
    with zipfile.ZipFile(world / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, str(outside / "secret.png"))
        archive.writestr("zeros.png", bytes(300_000_000))
        archive.writestr("locked.png", b"x")
    data = bytearray((world / "images.zip").read_bytes())
    entry = data.rindex(b"locked.png") - 46  # in the directory; the flag says that it is encrypted
    data[entry + 8] |= 1
    (world / "images.zip").write_bytes(data)
    path = world / "x.json"
    names = ("link.png", "zeros.png", "locked.png")
    path.write_text(json.dumps([good("trace", n) | {"image": name} for n, name in enumerate(names)]))
    rows = read(path, Reading(images=ZipImages(world / "images.zip")))
    assert isinstance(rows, list)
    for row, rule in zip(
        rows, ("not a readable image", "at most 256,000,000 bytes", "not a readable member"), strict=True
    ):
        with pytest.raises(BadInput, match=rule):
            row.image.open()  # type: ignore[union-attr]


def test_damaged_zips_are_refused(world: Path) -> None:
    write_zip(world / "good.zip", world / "images")
    data, rng = (world / "good.zip").read_bytes(), np.random.default_rng(0)
    path = world / "x.json"
    path.write_text(json.dumps([good("trace", n) for n in range(3)]))
    for number in range(60):
        made, at = bytearray(data), int(rng.integers(len(data)))
        made[at : at + int(rng.integers(1, 9))] = bytes(rng.integers(0, 256, 4, dtype=np.uint8))
        (world / f"{number}.zip").write_bytes(made if number % 3 else data[:at])
        images = attempt(partial(ZipImages, world / f"{number}.zip"))
        if isinstance(images, str):
            assert f"{number}.zip: not a readable zip file" in images
            continue
        rows = read(path, Reading(images=images))
        for row in rows if isinstance(rows, list) else []:
            picture = attempt(row.image.open)  # type: ignore[union-attr]
            assert f"{number}.zip/" in picture if isinstance(picture, str) else picture.getpixel((0, 0))[0] == 200


@pytest.mark.parametrize("container", ["json", "jsonl"])
@pytest.mark.parametrize("form", FORMATS[:5])
def test_texts_of_ten_megabytes_are_read(world: Path, form: str, container: str) -> None:
    record, long = good(form, 0), "Ünï " * 2_500_000
    key = "say" if form == "fields" else "output" if form == "alpaca" else "answer"
    if form == "llava":
        record["conversations"][1]["value"] = long
    else:
        record[key] = long
    path = world / f"x.{container}"
    lines = [json.dumps(row, ensure_ascii=False) for row in (good(form, 2), record, good(form, 4))]
    path.write_text("\n".join(lines) if container == "jsonl" else f"[{','.join(lines)}]")
    rows = read(path, Reading(form, FolderImages(world / "images"), fields=FIELDS))
    assert isinstance(rows, list)
    assert [len(row.answer) for row in rows] == [8, len(long) - 1, 8]
    path.write_bytes(path.read_bytes()[:9_000_000])
    message = read(path, Reading(form, FolderImages(world / "images"), fields=FIELDS))
    assert isinstance(message, str)
    assert "x." in message
    assert "record 2: must be" in message


@pytest.mark.parametrize("change", ["shorter", "longer", "touched", "gone", "folder"])
def test_a_file_changed_after_loading_is_noticed(world: Path, change: str) -> None:
    path = world / "x.json"
    path.write_text(json.dumps([good("trace", n) for n in range(6)]))
    rows = load_file(path, Reading(images=FolderImages(world / "images")), Found())
    assert rows[5].answer == "answer 5"
    if change in ("gone", "folder"):
        path.unlink()
    if change == "folder":
        path.mkdir()
    if change == "touched":
        os.utime(path, ns=(1, 1))
    if change in ("shorter", "longer"):
        path.write_text(json.dumps([good("trace", n) for n in range(5 if change == "shorter" else 7)]))
    with pytest.raises(BadInput, match=r"x.json: (was changed|is gone) since it was loaded"):
        rows[5]


def test_a_file_changed_behind_its_stamp_is_never_a_traceback(world: Path) -> None:
    path, rng = world / "x.json", np.random.default_rng(0)
    data = json.dumps([good("trace", n) for n in range(6)]).encode()
    path.write_bytes(data)
    rows, stamp = load_file(path, Reading(images=FolderImages(world / "images")), Found()), path.stat()
    for _ in range(40):
        made = bytearray(data)
        made[rng.integers(len(made))] = rng.integers(256)
        path.write_bytes(made)
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        for row in range(6):
            read_again = attempt(partial(rows.read, row))
            assert isinstance(read_again, Example) or f"{path}: record {row + 1}" in read_again


HOSTILE: dict[str, Any] = {
    "cut": json.dumps([good("trace", n) for n in range(9)]).encode()[:-60],
    "no UTF-8": b'[{"prompt": "a", "answer": "\xff"}]',
    "surrogates": json.dumps([{"prompt\ud800": "a"}]).encode(),
    "deep": b"[" * 100_000,
    "leads out": json.dumps([good("trace", 0) | {"image": "../secret.png"}]).encode(),
    "link": json.dumps([good("trace", 0) | {"image": "link.png"}]).encode(),
}


def scenario(folder: Path, data: bytes) -> list[str]:
    (folder / "train.json").write_bytes(data)
    block = {"train": "train.json", "test": "train.json", "images": "images", "format": "auto"}
    (folder / "mine.yaml").write_text(yaml.safe_dump({"tasks": {"mine": block}, "stages": [["mine"]]}))
    words = [f"scenario.name={folder / 'mine.yaml'}", "federation.clients=1", "federation.clients_per_round=1"]
    return ["run", "--dry-run", *words]


@pytest.mark.parametrize("case", HOSTILE)
def test_the_command_line_says_what_is_wrong_and_ends_with_two(
    folder: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedstrata.server import guard
    from fedstrata.server.cli import main

    monkeypatch.setattr(guard, "begin", lambda: None)  # this process is no command: it must not be forked
    monkeypatch.setattr(sys, "argv", ["fedstrata", *scenario(folder, HOSTILE[case])])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert re.search(r"train\.json: record \d+", said)
    assert "Traceback" not in said


def test_the_real_command_ends_with_two_and_no_traceback(folder: Path) -> None:
    call = [sys.executable, "-c", "from fedstrata.server.cli import main; main()"]
    done = subprocess.run(
        [*call, *scenario(folder, HOSTILE["surrogates"])], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 2
    assert "train.json: record 1: must be of a known form" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
