"""Commits: whole or not at all, and what the newest good one is."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedstrata.core.errors import BadInput
from fedstrata.server import checkpoint
from fedstrata.server.checkpoint import Commit, newest, require_newest, state_sha256, write, write_atomic
from fedstrata.strategies.base import Parts


def commit(number: int, value: float = 0.0) -> Commit:
    tensors = {"adapter": np.full((2, 3), value, np.float32), "empty": np.zeros((0, 4), np.float32)}
    return Commit(Parts(tensors, {"counts": [number]}), {"stage": 1, "round": number}, number)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def both(number: int) -> list[str]:
    return [f"{number:06d}.json", f"{number:06d}.safetensors"]


def test_the_newest_commit_comes_back_as_it_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"  # made by the first write
    for number in (1, 2):
        write(folder, commit(number, number / 4))
    found = newest(folder)
    assert found is not None
    assert (found.number, found.progress) == (2, {"stage": 1, "round": 2})
    assert found.parts.facts == {"counts": [2]}
    assert found.parts.tensors["adapter"].tolist() == [[0.5] * 3] * 2
    assert found.parts.tensors["adapter"].dtype == np.float32
    assert found.parts.tensors["empty"].shape == (0, 4)
    assert state_sha256(found.parts) == state_sha256(commit(2, 0.5).parts)


def test_a_folder_without_commits_has_no_newest(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    assert newest(tmp_path / "nowhere") is None


def test_commands_that_need_a_commit_name_the_folder_without_one(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="checkpoints: holds no commit that verifies"):
        require_newest(tmp_path)
    write(tmp_path / "checkpoints", commit(1))
    assert require_newest(tmp_path).number == 1


def test_the_two_newest_commits_are_kept(tmp_path: Path) -> None:
    for number in range(1, 6):
        write(tmp_path, commit(number))
    assert names(tmp_path) == both(4) + both(5)


def test_the_ends_of_stages_are_kept_for_good(tmp_path: Path) -> None:
    for number in range(1, 7):
        write(tmp_path, commit(number), keep_for_good=number in (1, 3))
    assert names(tmp_path) == both(1) + both(3) + both(5) + both(6)


def test_the_ninth_commit_is_older_than_the_tenth(tmp_path: Path) -> None:
    for number in (9, 10):
        write(tmp_path, commit(number))
    found = newest(tmp_path)
    assert found is not None
    assert found.number == 10


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def foreign(path: Path) -> None:
    path.write_text("[1, 2]", encoding="utf-8")


@pytest.mark.parametrize("spoil", [flip, cut, empty, remove])
def test_a_spoilt_blob_falls_back_by_one_commit(tmp_path: Path, spoil: Any) -> None:
    for number in (1, 2):
        write(tmp_path, commit(number))
    spoil(tmp_path / "000002.safetensors")
    found = newest(tmp_path)
    assert found is not None
    assert found.number == 1


@pytest.mark.parametrize("spoil", [cut, empty, remove, foreign])
def test_a_spoilt_manifest_falls_back_by_one_commit(tmp_path: Path, spoil: Any) -> None:
    for number in (1, 2):
        write(tmp_path, commit(number))
    spoil(tmp_path / "000002.json")
    found = newest(tmp_path)
    assert found is not None
    assert found.number == 1


@pytest.mark.parametrize("key", ["blob", "facts", "progress", "number"])
def test_a_manifest_without_one_of_its_keys_falls_back_by_one_commit(tmp_path: Path, key: str) -> None:
    for number in (1, 2):
        write(tmp_path, commit(number))
    path = tmp_path / "000002.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    del manifest[key]
    path.write_text(json.dumps(manifest), encoding="utf-8")
    found = newest(tmp_path)
    assert found is not None
    assert found.number == 1


@pytest.mark.parametrize("spoil", [cut, empty, foreign])
def test_a_spoilt_manifest_does_not_stop_later_commits(tmp_path: Path, spoil: Any) -> None:
    for number in (1, 2):
        write(tmp_path, commit(number))
    spoil(tmp_path / "000002.json")
    for number in range(3, 7):
        write(tmp_path, commit(number))
    found = newest(tmp_path)
    assert found is not None
    assert found.number == 6
    assert set(both(5) + both(6)) <= set(names(tmp_path))
    assert not set(both(3) + both(4)) & set(names(tmp_path))


def test_a_spoilt_commit_is_replaced_when_its_round_is_run_again(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path, commit(number))
    flip(tmp_path / "000002.safetensors")
    write(tmp_path, commit(2, 7.0))
    found = newest(tmp_path)
    assert found is not None
    assert found.number == 2
    assert found.parts.tensors["adapter"][0, 0] == 7


def test_all_commits_spoilt_is_no_commit(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path, commit(number))
        flip(tmp_path / f"{number:06d}.safetensors")
    assert newest(tmp_path) is None


def test_a_power_cut_between_blob_and_manifest_leaves_the_older_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, commit(1))
    real = write_atomic

    def interrupted(path: Path, data: bytes) -> None:
        if path.suffix == ".json":
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(checkpoint, "write_atomic", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, commit(2))
    found = newest(tmp_path)
    assert found is not None
    assert found.number == 1


def test_an_interrupted_write_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "matrix.json"
    write_atomic(path, b"old")

    def fails(fd: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new and longer")
    assert path.read_bytes() == b"old"


def test_a_written_file_leaves_no_temporary_one(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a.json", b"1")
    write_atomic(tmp_path / "a.json", b"2")
    assert names(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == b"2"


BASE = Parts({"a": np.array([1, 2], np.float32), "b": np.zeros((2, 2), np.float32)}, {"counts": [3], "tau": 0.5})


def test_the_state_hash_is_that_of_its_documented_bytes() -> None:
    text = b'["a", "float32", [2]]' + np.array([1, 2], "<f4").tobytes() + b'{"tau":0.5}'
    assert state_sha256(Parts({"a": np.array([1, 2], np.float32)}, {"tau": 0.5})) == hashlib.sha256(text).hexdigest()


def test_the_state_hash_does_not_depend_on_the_order_of_names_or_facts() -> None:
    turned = Parts({name: BASE.tensors[name] for name in "ba"}, {"tau": 0.5, "counts": [3]})
    assert list(turned.tensors) != list(BASE.tensors)
    assert state_sha256(turned) == state_sha256(BASE)


def test_the_state_hash_does_not_depend_on_the_memory_layout() -> None:
    wide = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert state_sha256(Parts({"a": wide[:, ::2]})) == state_sha256(Parts({"a": wide[:, ::2].copy()}))
    assert state_sha256(Parts({"a": np.asfortranarray(wide)})) == state_sha256(Parts({"a": wide}))


def test_any_one_bit_shows_in_the_state_hash() -> None:
    seen = {state_sha256(BASE)}
    for bit in range(64):
        data = bytearray(BASE.tensors["a"].tobytes())
        data[bit // 8] ^= 1 << bit % 8
        changed = np.frombuffer(bytes(data), np.float32)
        seen.add(state_sha256(Parts({**BASE.tensors, "a": changed}, BASE.facts)))
    assert len(seen) == 65


@pytest.mark.parametrize(
    "other",
    [
        Parts({**BASE.tensors, "a": BASE.tensors["a"].view(np.int32)}, BASE.facts),  # equal bytes, other type
        Parts({**BASE.tensors, "b": np.zeros(4, np.float32)}, BASE.facts),  # equal bytes, other shape
        Parts({"c": BASE.tensors["a"], "b": BASE.tensors["b"]}, BASE.facts),  # another name
        Parts({"a": BASE.tensors["a"]}, BASE.facts),
        Parts({**BASE.tensors, "c": np.zeros(0, np.float32)}, BASE.facts),
        Parts(BASE.tensors, {**BASE.facts, "tau": 0.25}),
        Parts(BASE.tensors, {"counts": [3]}),
    ],
)
def test_type_shape_name_and_facts_show_in_the_state_hash(other: Parts) -> None:
    assert state_sha256(other) != state_sha256(BASE)
