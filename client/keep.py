"""What a deployed client remembers, on its own disk: it survives the trainer, the SuperNode and the run's resumes.

One file per round in which the client trained, `memory/<run>-<partition>/<stage>-<round>`, holding what it remembered
after it. Whoever is asked to train round r begins with the newest file *before* r and drops the others: a round that is
asked for again (the server resumed, or a new run of the same config began) finds what it found the first time.

Nobody tells a client that a run is over, so the memories of the last `RUNS` runs stay; when a new run begins, older
ones go. A run that is resumed after that many others finds no memory, as if the client came late.
"""

import re
import shutil
from itertools import pairwise
from pathlib import Path

from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto

from fedstrata.core import durable
from fedstrata.core.config import require
from fedstrata.core.records import Binding

RUNS = 8  # whose memories are kept
When = tuple[int, int]  # stage, round


class Keep:
    """The memory of one client under one folder."""

    def __init__(self, home: Path) -> None:
        self.home = home / "memory"

    def load(self, at: Binding) -> RecordDict:
        """What the client remembered before this round; later memories are forgotten."""
        kept = self._kept(at)
        for when in [when for when in kept if when >= (at.stage, at.round)]:
            durable.remove(kept.pop(when))
        return _read(kept[max(kept)]) if kept else RecordDict()

    def store(self, at: Binding, state: RecordDict) -> None:
        """What it remembers after this round, whole or not at all; of earlier ones, the last of each stage stays."""
        folder = self._folder(at)
        if not folder.exists():
            self._forget(RUNS - 1)
        durable.make_folder(folder)
        durable.sweep(folder)
        data = recorddict_to_proto(state).SerializeToString()
        durable.write_atomic(folder / f"{at.stage}-{at.round}", data)
        kept = self._kept(at)
        order = sorted(kept)
        for when, after in pairwise(order[:-1]):  # the newest two serve a resume
            if when[0] == after[0]:
                durable.remove(kept[when])

    def secret(self, state: RecordDict | None = None) -> RecordDict:
        """What belongs to the client whatever the run; given a state, it is kept from now on."""
        path = self.home / "own"
        if state is not None:
            durable.make_folder(self.home)
            durable.write_atomic(path, recorddict_to_proto(state).SerializeToString())
            path.chmod(0o600)
        return _read(path) if path.exists() else RecordDict()

    def _folder(self, at: Binding) -> Path:
        """Raises `BadInput` unless the server's words, which become a path here, are a lineage id and whole numbers."""
        numbers = all(type(number) is int for number in (at.stage, at.round, at.partition))
        good = numbers and re.fullmatch("[0-9a-f]{1,64}", at.run) is not None
        require(good, "message", "of a run named by 1 to 64 hex digits, at a whole stage, round and client", at)
        return self.home / f"{at.run}-{at.partition}"

    def _forget(self, most: int) -> None:
        """Of the runs before, those in which the client trained last stay; a memory goes whole or not at all."""
        runs = [path for path in self.home.glob("*-*") if path.is_dir() and not path.name.startswith(".")]
        for path in sorted(runs, key=lambda path: path.stat().st_mtime_ns)[: max(0, len(runs) - most)]:
            path.rename(path.with_name(f".{path.name}"))
        for path in self.home.glob(".*-*"):  # also what was left when it was killed here
            shutil.rmtree(path)

    def _kept(self, at: Binding) -> dict[When, Path]:
        """(stage, round) → file."""
        found = {}
        for path in self._folder(at).glob("[0-9]*-[0-9]*"):
            stage, _, round_ = path.name.partition("-")
            found[int(stage), int(round_)] = path
        return found


def _read(path: Path) -> RecordDict:
    return recorddict_from_proto(Proto.FromString(path.read_bytes()))
