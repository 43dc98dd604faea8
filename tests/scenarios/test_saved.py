"""Saved partitions: what was written is what is read, and everything else is refused by name."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedstrata.core.errors import BadInput
from fedstrata.scenarios.dealing import Shares, iid
from fedstrata.scenarios.partition import PARTITIONS, Deck, PartitionRule, describe
from fedstrata.scenarios.saved import load_saved, save_partition, sha256_of

DIGEST = "ab" * 32
HANDS = [[1, 2], [], [0, 3]]


def shares(hands: list[list[int]]) -> Shares:
    return tuple(np.array(hand, dtype=np.int64) for hand in hands)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Task `charts`: four rows at three clients."""
    save_partition(tmp_path / "who.json", {"charts": (DIGEST, shares(HANDS)), "icons": ("cd" * 32, shares(HANDS))})
    return tmp_path / "who.json"


def read(path: Path, task: str = "charts", digest: str = DIGEST, rows: int = 4, clients: int = 3) -> list[list[int]]:
    found = load_saved(path, task, digest, rows, clients)
    assert all(hand.dtype == np.int64 for hand in found)
    return [hand.tolist() for hand in found]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 2**31))
def test_what_was_saved_comes_back(tmp_path_factory: pytest.TempPathFactory, n: int, clients: int, seed: int) -> None:
    path, dealt = tmp_path_factory.mktemp("saved") / "who.json", iid(n, clients, seed, min_size=0)
    save_partition(path, {"ä\0 b": (DIGEST, dealt)})
    assert read(path, "ä\0 b", rows=n, clients=clients) == [hand.tolist() for hand in dealt]
    assert [entry.name for entry in path.parent.iterdir()] == ["who.json"]


def test_saving_replaces_what_was_there(saved: Path) -> None:
    save_partition(saved, {"charts": (DIGEST, shares([[0], [1]]))})
    assert read(saved, rows=2, clients=2) == [[0], [1]]


def test_rows_may_be_in_any_order(saved: Path) -> None:
    saved.write_text(saved.read_text().replace("[1, 2]", "[2, 1]"))
    assert read(saved) == HANDS


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"clients": 4}, "was saved for 3 clients, federation.clients is 4"),
        ({"task": "chart"}, "tasks must have the task chart with digest and shares, got charts, icons"),
        ({"digest": "ef" * 32}, r"tasks.charts: was saved for other training rows \(digest abababababababab …\)"),
        ({"rows": 5}, "tasks.charts: every row must be at exactly one client, row 4 is at 0"),
        ({"rows": 3}, "tasks.charts: rows must be between 0 and 2, got 3"),
    ],
)
def test_a_partition_of_something_else_is_refused(saved: Path, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=f"^{saved}: {message}"):
        read(saved, **asked)


COVER = "every row must be at exactly one client"
LISTS = "shares must be a list of lists of row numbers"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([[1, 2], [1], [0, 3]], f"{COVER}, row 1 is at 2"),
        ([[1, 2, 2], [], [0, 3]], f"{COVER}, row 2 is at 2"),
        ([[1, 2], [], [3]], f"{COVER}, row 0 is at 0"),
        ([[], [], []], f"{COVER}, row 0 is at 0"),
        ([[1, 2], [], [0, 4]], "rows must be between 0 and 3, got 4"),
        ([[1, 2], [-1], [0, 3]], "rows must be between 0 and 3, got -1"),
        ([[1, 2], [10**30], [0, 3]], "rows must be between 0 and 3, got 1000000"),
        ([[1, 2], [-(10**30)], [0, 3]], "rows must be between 0 and 3, got -1000000"),
        ([[1, 2], [], [0, 3], []], "shares must have one list for each of 3 clients, got 4"),
        ([[0, 1, 2, 3]], "shares must have one list for each of 3 clients, got 1"),
        ([[1, 2], [], [0, 3.0]], LISTS),
        ([[True, 2], [], [0, 3]], LISTS),
        ([["1", 2], [], [0, 3]], LISTS),
        ([[1, 2], None, [0, 3]], LISTS),
        ([[[1], 2], [], [0, 3]], LISTS),
        ({"0": [1, 2]}, LISTS),
        (None, LISTS),
        ("0123", LISTS),
    ],
)
def test_wrong_shares_are_refused(saved: Path, wrong: object, message: str) -> None:
    tree = json.loads(saved.read_text())
    tree["tasks"]["charts"]["shares"] = wrong
    saved.write_text(json.dumps(tree))
    with pytest.raises(BadInput, match=f"^{saved}: tasks.charts: {message}"):
        read(saved)
    assert read(saved, "icons", "cd" * 32) == HANDS


def put(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda tree: tree | values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(version=2), "must hold a saved partition of version 1"),
        (put(version=None), "must hold a saved partition of version 1"),
        (put(tasks=[]), "must hold a saved partition of version 1"),
        (lambda tree: [tree], "must hold a saved partition of version 1"),
        (lambda tree: None, "must hold a saved partition of version 1"),
        (lambda tree: {}, "must hold a saved partition of version 1"),
        (put(clients=None), "was saved for None clients"),
        (put(clients="3"), "was saved for 3 clients, federation.clients is 3"),
        (put(tasks={}), "tasks must have the task charts"),
        (put(tasks={"charts": []}), "tasks must have the task charts with digest and shares"),
        (put(tasks={"charts": {"digest": DIGEST}}), "tasks must have the task charts with digest and shares"),
        (put(tasks={"charts": {"digest": 5, "shares": HANDS}}), r"tasks.charts: was saved for other .* \(digest 5 …"),
    ],
)
def test_another_structure_is_refused(saved: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    saved.write_text(json.dumps(change(json.loads(saved.read_text()))))
    with pytest.raises(BadInput, match=f"^{saved}: {message}"):
        read(saved)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\0\0\0", b"\xff\xfe", b'{"version": 1', b"[" * 100_000, b"9" * 5_000, b"kind: iid"],
    ids=["empty", "cut", "NUL", "no text", "cut later", "deep", "long number", "YAML"],
)
def test_what_is_no_json_is_refused(saved: Path, data: bytes) -> None:
    saved.write_bytes(data)
    with pytest.raises(BadInput, match=f"^{saved}: not a readable partition file: "):
        read(saved)


@pytest.mark.parametrize("name", ["gone.json", ".", "a\0b", "who.json/x"])
def test_a_file_that_cannot_be_read_is_named(saved: Path, name: str) -> None:
    with pytest.raises(BadInput, match="not a readable partition file: "):
        read(saved.parent / name)


def test_the_kind_file_deals_what_was_saved_and_honours_min_size(saved: Path) -> None:
    deck = Deck(np.zeros(4, dtype=np.uint64), 3, 0, name="charts", digest=DIGEST, folder=saved.parent)
    dealt = PARTITIONS["file"](deck, PartitionRule("file", min_size=0, file="who.json"))
    assert [hand.tolist() for hand in dealt] == HANDS
    with pytest.raises(BadInput, match="client 1 must hold at least 1 rows, got 0"):
        PARTITIONS["file"](deck, PartitionRule("file", file="who.json"))


def test_the_hash_is_told_the_files_content_and_not_its_path(saved: Path) -> None:
    (saved.parent / "other").mkdir()
    (saved.parent / "other/copy.json").write_bytes(saved.read_bytes())
    sha = hashlib.sha256(saved.read_bytes()).hexdigest()
    told = {"kind": "file", "beta": 1.0, "min_size": 0, "file": sha}
    assert describe(PartitionRule("file", min_size=0, file="who.json"), saved.parent) == told
    assert describe(PartitionRule("file", min_size=0, file="other/copy.json"), saved.parent) == told
    assert sha256_of(saved.parent / "gone.json") == ""
