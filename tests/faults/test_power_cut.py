"""Every state in which a power cut can leave a commit: none of them loses a round that was acknowledged.

The file layer's steps (`core/durable.py`) are written down while some commits are made. A cut may come after any of
them; then every file whose data were not flushed may be whole, half or empty, and every rename or removal since its
folder's last flush may have reached the disk or not, each for itself. All of these folders are made and opened.
"""

import itertools
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedstrata.core import durable
from fedstrata.server import checkpoint
from fedstrata.server.checkpoint import Commit, newest, state_sha256
from fedstrata.strategies.base import Parts

STEPS = ("put", "sync_file", "rename", "sync_folder", "remove")
ROUNDS = 5
STATES = 152  # that a cut can leave these commits in


@dataclass(frozen=True)
class Step:
    """One operation; `acknowledged`: the last commit that had been told to be safe when it was done."""

    kind: str
    name: str  # of the file, without its folder
    data: bytes = b""
    target: str = ""
    acknowledged: int = 0


@dataclass
class Disk:
    """What a machine finds after a cut: what is certain, and what may or may not have come through.

    A file is an i-node's number; `names` is the folder as it was last flushed, `loose` what happened to names since.
    """

    data: dict[int, bytes] = field(default_factory=dict)
    flushed: set[int] = field(default_factory=set)
    names: dict[str, int] = field(default_factory=dict)
    now: dict[str, int] = field(default_factory=dict)
    loose: list[tuple[str, int | None]] = field(default_factory=list)

    def do(self, step: Step) -> None:
        """Raises KeyError for a step that the layer must not take (a rename of what is not there)."""
        if step.kind == "put":
            if step.name not in self.now:
                self._point(step.name, len(self.data))
            number = self.now[step.name]
            self.data[number] = self.data.get(number, b"") + step.data
            self.flushed.discard(number)
        elif step.kind == "sync_file":
            self.flushed.add(self.now[step.name])
        elif step.kind == "rename":
            self._point(step.target, self.now[step.name])
            self._point(step.name, None)
        elif step.kind == "remove":
            self._point(step.name, None)
        else:
            self.names, self.loose = dict(self.now), []

    def _point(self, name: str, number: int | None) -> None:
        self.loose.append((name, number))
        if number is None:
            self.now.pop(name, None)
        else:
            self.now[name] = number

    def after_a_cut(self) -> Iterator[dict[str, bytes]]:
        """Every folder that may be found. Names are kept or lost one by one; all unflushed data share one fate."""
        seen: set[frozenset[tuple[str, int]]] = set()
        for kept in itertools.product((False, True), repeat=len(self.loose)):
            names = dict(self.names)
            for (name, number), there in zip(self.loose, kept, strict=True):
                if there and number is None:
                    names.pop(name, None)
                elif there and number is not None:
                    names[name] = number
            if frozenset(names.items()) in seen:
                continue
            seen.add(frozenset(names.items()))
            torn = any(number not in self.flushed for number in names.values())
            for share in (0.0, 0.5, 1.0) if torn else (1.0,):
                yield {name: self._content(number, share) for name, number in names.items()}

    def _content(self, number: int, share: float) -> bytes:
        data = self.data[number]
        return data if number in self.flushed else data[: int(share * len(data))]


def commit(number: int) -> Commit:
    """Two tensors, one of which changes from round to round."""
    tensors = {"adapter": np.full(3, number, np.float32), "token": np.ones(2, np.float32)}
    return Commit(Parts(tensors, {"counts": [number]}), {"stage": 1, "round": number}, number)


def recorded(folder: Path, patch: pytest.MonkeyPatch, leave_out: str = "") -> list[Step]:
    """The steps of some commits, the third of them the end of a stage; `leave_out` is not done and not written down."""
    steps: list[Step] = []
    acknowledged = 0

    def recording(kind: str) -> Any:
        real = getattr(durable, kind)

        def step(*arguments: Any) -> None:
            if kind == leave_out:
                return
            first = Path(getattr(arguments[0], "name", "") if kind in ("put", "sync_file") else arguments[0]).name
            data = arguments[1] if kind == "put" else b""
            target = arguments[1].name if kind == "rename" else ""
            steps.append(Step(kind, first, data, target, acknowledged))
            real(*arguments)

        return step

    for kind in STEPS:
        patch.setattr(durable, kind, recording(kind))
    for number in range(1, ROUNDS + 1):
        checkpoint.write(folder, commit(number), keep_for_good=number == 3)
        acknowledged = number
    steps.append(Step("end", "", acknowledged=acknowledged))
    return steps


def states(steps: Sequence[Step]) -> Iterator[tuple[int, dict[str, bytes]]]:
    """(last acknowledged commit, a folder that may be found) for a cut before any of the steps."""
    disk = Disk()
    for step in steps:
        for found in disk.after_a_cut():
            yield step.acknowledged, found
        if step.kind != "end":
            disk.do(step)


def lost(folder: Path, acknowledged: int, files: dict[str, bytes]) -> bool:
    """Whether the newest commit that verifies there is older than the acknowledged one, or is not what was written."""
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    found = newest(folder)
    shutil.rmtree(folder)
    if found is None:
        return acknowledged > 0
    same = state_sha256(found.parts) == state_sha256(commit(found.number).parts)
    return not same or not acknowledged <= found.number <= acknowledged + 1


def judged(tmp_path: Path, leave_out: str = "") -> Iterator[bool]:
    """For every state whether it loses a commit."""
    with pytest.MonkeyPatch.context() as patch:
        steps = recorded(tmp_path / "run", patch, leave_out)
    return (lost(tmp_path / "cut", acknowledged, files) for acknowledged, files in states(steps))


def test_no_state_after_a_power_cut_loses_an_acknowledged_commit(tmp_path: Path) -> None:
    found = list(judged(tmp_path))
    assert not any(found)
    assert len(found) == STATES


@pytest.mark.parametrize("leave_out", ["sync_file", "sync_folder"])
def test_without_a_flush_some_state_loses_a_commit(tmp_path: Path, leave_out: str) -> None:
    assert any(judged(tmp_path, leave_out))


def test_the_disk_is_what_was_written_when_everything_was_flushed(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        steps = recorded(tmp_path / "run", patch)
    disk = Disk()
    for step in steps[:-1]:
        disk.do(step)
    there = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert {name: disk.data[number] for name, number in disk.now.items()} == there
