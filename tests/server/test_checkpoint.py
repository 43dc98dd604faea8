"""Commits: whole or not at all, and what the newest good one is."""

import errno
import hashlib
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from fedstrata.core import durable
from fedstrata.core.durable import write_atomic
from fedstrata.core.errors import BadInput
from fedstrata.server import checkpoint, manifest
from fedstrata.server.checkpoint import Commit, find, newest, require_newest, stage_start, state_sha256, write
from fedstrata.strategies.base import Parts


def commit(number: int, value: float = 0.0) -> Commit:
    tensors = {"adapter": np.full((2, 3), value, np.float32), "empty": np.zeros((0, 4), np.float32)}
    return Commit(Parts(tensors, {"counts": [number]}), {"stage": 1, "round": number}, number)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def numbers(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in folder.glob("[0-9]*.json") if len(path.stem) == 6)


def stored(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.safetensors")}


def tree(folder: Path, number: int) -> dict[str, Any]:
    return dict(json.loads((folder / f"{number:06d}.json").read_text(encoding="utf-8")))


def blob(folder: Path, number: int, name: str = "adapter") -> Path:
    """The file that holds a commit's tensor."""
    return folder / f"{tree(folder, number)['tensors'][name]}.safetensors"


def old(folder: Path, at: Commit, keep: bool = False) -> None:
    """A commit as version 1 wrote it."""
    folder.mkdir(parents=True, exist_ok=True)
    data = save(dict(at.parts.tensors))
    manifest = {
        "version": 1,
        "number": at.number,
        "blob": hashlib.sha256(data).hexdigest(),
        "facts": at.parts.facts,
        "progress": at.progress,
        "keep": keep,
    }
    (folder / f"{at.number:06d}.safetensors").write_bytes(data)
    (folder / f"{at.number:06d}.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


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
    assert numbers(tmp_path) == [4, 5]


def test_the_ends_of_stages_are_kept_for_good(tmp_path: Path) -> None:
    for number in range(1, 7):
        write(tmp_path, commit(number), keep_for_good=number in (1, 3))
    assert numbers(tmp_path) == [1, 3, 5, 6]


def test_the_ninth_commit_is_older_than_the_tenth(tmp_path: Path) -> None:
    for number in (9, 10):
        write(tmp_path, commit(number))
    found = newest(tmp_path)
    assert found is not None
    assert found.number == 10


def test_a_clock_that_jumps_back_changes_no_order(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        write(tmp_path, commit(number))
        for path in tmp_path.iterdir():
            os.utime(path, (1e6 - number, 1e6 - number))  # what is written later looks older
    found = newest(tmp_path)
    assert found is not None
    assert found.number == 3
    assert numbers(tmp_path) == [2, 3]


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
        write(tmp_path, commit(number, number))
    spoil(blob(tmp_path, 2))
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


@pytest.mark.parametrize("key", ["tensors", "facts", "progress", "number", "keep", "hash", "version"])
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
    assert numbers(tmp_path) == [2, 5, 6]  # the spoilt one stays, as evidence


def test_a_spoilt_commit_is_replaced_when_its_round_is_run_again(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path, commit(number))
    flip(blob(tmp_path, 2))
    write(tmp_path, commit(2, 7.0))
    found = newest(tmp_path)
    assert found is not None
    assert found.number == 2
    assert found.parts.tensors["adapter"][0, 0] == 7


def test_all_commits_spoilt_is_no_commit(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path, commit(number))
        flip(blob(tmp_path, number))
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
    assert names(tmp_path) == ["matrix.json"]


def test_a_written_file_leaves_no_temporary_one(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a.json", b"1")
    write_atomic(tmp_path / "a.json", b"2")
    assert names(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == b"2"


def test_equal_tensors_are_stored_once(tmp_path: Path) -> None:
    same = np.arange(5, dtype=np.float32)
    parts = Parts({"a": same, "b": same.copy(), "c": same.reshape(5, 1)})
    write(tmp_path, Commit(parts, {}, 1, Parts({"known": same})))
    write(tmp_path, Commit(Parts({"a": same}), {}, 2))
    assert len(stored(tmp_path)) == 2
    assert tree(tmp_path, 1)["tensors"]["a"] == tree(tmp_path, 2)["tensors"]["a"]


def test_what_was_not_changed_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, commit(1))
    written: list[str] = []
    real = durable.rename
    monkeypatch.setattr(durable, "rename", lambda old, new: (written.append(new.name), real(old, new))[1])
    write(tmp_path, commit(2))
    assert written == ["000002.json"]


def test_a_blob_goes_when_no_manifest_names_it(tmp_path: Path) -> None:
    for number in range(1, 5):
        write(tmp_path, commit(number, number), keep_for_good=number == 1)
    named = {sha for number in numbers(tmp_path) for sha in tree(tmp_path, number)["tensors"].values()}
    assert numbers(tmp_path) == [1, 3, 4]
    assert stored(tmp_path) == named
    assert len(named) == 4  # three values and the empty tensor


def test_old_manifests_are_gone_for_good_before_their_blobs_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    for number in (1, 2):
        write(tmp_path, commit(number, number))
    for name in ("rename", "remove", "sync_folder"):
        real = getattr(durable, name)
        monkeypatch.setattr(
            durable,
            name,
            lambda *paths, name=name, real=real: (steps.append(f"{name} {paths[-1].suffix}"), real(*paths))[1],
        )
    write(tmp_path, commit(3, 3))
    assert steps == [
        *["rename .safetensors", "sync_folder "],
        *["rename .json", "sync_folder "],
        *["remove .json", "sync_folder "],
        "remove .safetensors",
    ]


def test_scalars_and_memory_come_back_too(tmp_path: Path) -> None:
    memory = Parts({"t": np.float64(0.5) * np.ones(()), "m": np.arange(3)}, {"2": [1, None], "x": {"10": 1, "9": 2}})
    write(tmp_path, Commit(Parts({}), {"trained": {2: {1: 3}, 10: {0: 1}}}, 1, memory, {"run": "abc"}))
    found = newest(tmp_path)
    assert found is not None
    assert found.memory.tensors["t"].shape == ()
    assert found.memory.tensors["m"].tolist() == [0, 1, 2]
    assert found.memory.facts == memory.facts
    assert found.progress == {"trained": {"2": {"1": 3}, "10": {"0": 1}}}
    assert found.bound == {"run": "abc"}


def test_any_bit_of_a_manifest_that_flips_is_found(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path, commit(number, number))
    path = tmp_path / "000002.json"
    whole = path.read_bytes()
    meaning = json.loads(whole)
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= 1 << position % 8
        path.write_bytes(bytes(data))
        found = find(tmp_path)
        assert found.commit is not None
        same = found.commit.number == 2 and json.loads(path.read_bytes()) == meaning  # white space may change
        assert same or (found.commit.number == 1 and len(found.damaged) == 1), position


def test_a_manifest_cut_anywhere_is_found(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path, commit(number, number))
    path = tmp_path / "000002.json"
    whole = path.read_bytes()
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        found = find(tmp_path)
        assert found.commit is not None
        assert found.commit.number == 1
        assert found.damaged[0].startswith("000002.json: ")


def test_bits_that_flip_in_blobs_are_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in (1, 2):
        write(tmp_path, commit(number, number))
    path = blob(tmp_path, 2)
    whole = path.read_bytes()
    for position in rng.integers(0, len(whole), 200).tolist():
        data = bytearray(whole)
        data[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(data))
        found = find(tmp_path)
        assert found.commit is not None
        assert found.commit.number == 1
        assert path.name in found.damaged[0]


def test_a_manifest_under_another_number_is_not_believed(tmp_path: Path) -> None:
    write(tmp_path, commit(1))
    (tmp_path / "000002.json").write_bytes((tmp_path / "000001.json").read_bytes())
    found = find(tmp_path)
    assert found.commit is not None
    assert found.commit.number == 1
    assert len(found.damaged) == 1


def test_a_commit_of_another_run_is_refused(tmp_path: Path) -> None:
    for name, value in (("ours", 0.0), ("theirs", 1.0)):
        for number in (1, 2):
            write(tmp_path / name, commit(number, value + number))
    for path in [tmp_path / "theirs" / "000002.json", *(tmp_path / "theirs").glob("*.safetensors")]:
        (tmp_path / "ours" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(BadInput, match="000002.json: does not continue the commit before it"):
        find(tmp_path / "ours")


def test_a_manifest_of_a_later_release_is_not_guessed_at(tmp_path: Path) -> None:
    write(tmp_path, commit(1))
    later = {**tree(tmp_path, 1), "version": 3, "number": 2}
    (tmp_path / "000002.json").write_text(json.dumps({**later, "hash": manifest.identity(later)}), encoding="utf-8")
    found = find(tmp_path)
    assert found.commit is not None
    assert (found.commit.number, len(found.damaged)) == (1, 1)


def test_commits_of_version_1_are_read_and_gone_on_from(tmp_path: Path) -> None:
    old(tmp_path, commit(1, 1), keep=True)
    for number in (2, 3):
        old(tmp_path, commit(number, number))
    found = newest(tmp_path)
    assert found is not None
    assert (found.number, found.memory, found.bound) == (3, Parts({}), {})
    assert state_sha256(found.parts) == state_sha256(commit(3, 3).parts)
    write(tmp_path, commit(4, 4))
    assert numbers(tmp_path) == [1, 3, 4]
    assert {"000001", "000003"} <= stored(tmp_path)
    assert "000002" not in stored(tmp_path)
    flip(blob(tmp_path, 4))
    found = newest(tmp_path)
    assert found is not None
    assert found.number == 3


@pytest.mark.parametrize("spoil", [flip, cut, remove])
def test_a_spoilt_blob_of_version_1_is_found(tmp_path: Path, spoil: Any) -> None:
    for number in (1, 2):
        old(tmp_path, commit(number, number))
    spoil(tmp_path / "000002.safetensors")
    found = find(tmp_path)
    assert found.commit is not None
    assert found.commit.number == 1
    assert found.damaged[0].startswith("000002.safetensors: ")


def test_the_commit_that_a_stage_begins_from(tmp_path: Path) -> None:
    at = [(1, 1, True), (1, 2, False), (2, 1, True), (2, 2, False), (2, 3, False), (3, 1, True)]
    for number, (stage, round_, keep) in enumerate(at, start=1):
        progress = {"stage": stage, "round": round_}
        write(tmp_path, Commit(commit(number, number).parts, progress, number), keep)
    numbers_found = [found.number if (found := stage_start(tmp_path, stage)) else None for stage in range(1, 5)]
    assert numbers_found == [1, 3, 6, None]
    checkpoint.drop_after(tmp_path, 3)
    assert numbers(tmp_path) == [1, 3]
    flip(blob(tmp_path, 1))
    assert stage_start(tmp_path, 1) is None


STEPS = ("put", "sync_file", "rename", "sync_folder", "remove")


class Stopped(BaseException):
    """The process ended here."""


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_a_crash_at_any_step_loses_no_commit_and_the_rest_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, after: bool
) -> None:
    """Every step of every commit is broken off once, before and after it; the commit is then made again."""
    for number in range(1, 6):
        write(tmp_path / "whole", commit(number, number % 3), number == 3)
    real, passed, stop = getattr(durable, step), 0, 0

    def breaks(*arguments: Any) -> None:
        nonlocal passed, stop
        passed += 1
        if passed == stop and not after:
            raise Stopped
        real(*arguments)
        if passed == stop:
            raise Stopped

    monkeypatch.setattr(durable, step, breaks)
    folder, done, number = tmp_path / "cut", 0, 1
    while number <= 5:
        stop, passed = stop + 1, 0
        try:
            write(folder, commit(number, number % 3), number == 3)
        except Stopped:
            found = newest(folder)
            assert (found.number if found else 0) in (done, number)
            continue
        done, number, stop = number, number + 1, 0
    left = newest(folder)
    assert left is not None
    assert state_sha256(left.parts) == state_sha256(commit(5, 2).parts)
    assert numbers(folder) == numbers(tmp_path / "whole")
    assert stored(folder) == stored(tmp_path / "whole")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_disk_that_refuses_any_one_step_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """The Nth step fails, for N = 1, 2, … until a commit meets no failure any more."""
    steps = ("put", "sync_file", "rename")
    real = {step: getattr(durable, step) for step in steps}
    for nth in range(1, 100):
        folder, passed = tmp_path / str(nth), 0
        with monkeypatch.context() as patch:
            write(folder, commit(1, 1))

            def fails(*arguments: Any, step: str, nth: int = nth) -> None:
                nonlocal passed
                passed += 1
                if passed == nth:
                    raise OSError(code, os.strerror(code))
                real[step](*arguments)

            for step in steps:
                patch.setattr(durable, step, partial(fails, step=step))
            try:
                write(folder, commit(2, 2))
            except OSError:
                found = newest(folder)
                assert found is not None
                assert found.number == 1
                assert not list(folder.glob(".*"))
            else:
                break
        write(folder, commit(2, 2))  # there is room again
        assert newest(folder) is not None
        assert len(stored(folder)) == 3
    assert nth == 7  # a blob and a manifest, three steps each; the empty tensor was there


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
