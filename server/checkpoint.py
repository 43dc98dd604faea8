"""One atomic commit per round: blobs named by their hashes, and a numbered manifest that names them.

Blobs are written first, the manifest last; each is flushed to the disk and renamed. The newest manifest that verifies
is where the run stands. What a manifest no longer needs is removed only after it is on the disk.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedstrata.core import durable
from fedstrata.core.durable import write_atomic
from fedstrata.core.errors import BadInput
from fedstrata.server import blobs, manifest
from fedstrata.server.manifest import Damaged, Manifest
from fedstrata.strategies.base import Parts

__all__ = ["Commit", "Found", "drop_after", "find", "newest", "require_newest", "stage_start", "state_sha256", "write"]

KEEP = 2  # newest commits kept; ends of stages are kept for good
MANIFESTS = "[0-9]*.json"


@dataclass(frozen=True)
class Commit:
    """What a commit holds: the strategy's state and the federation loop's progress.

    Attributes:
        memory: what a resumed run must know and the state's hash leaves out (known tokens, an optimiser's moments).
        bound: what the commit belongs to (settings, hashes of base and scenario); empty in older commits.
        stored: tensors of the memory that are blobs already, by the names of both; a commit that is read has none.
    """

    parts: Parts
    progress: dict[str, Any]
    number: int
    memory: Parts = field(default_factory=lambda: Parts({}))
    bound: Mapping[str, Any] = field(default_factory=dict)
    stored: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """The newest commit that verifies, and what is wrong with each newer one."""

    commit: Commit | None
    damaged: tuple[str, ...] = ()


def state_sha256(parts: Parts) -> str:
    """SHA-256 over the sorted (name, dtype, shape, little-endian bytes) of the tensors and the canonical JSON facts."""
    sha = hashlib.sha256()
    for name, tensor in sorted(parts.tensors.items()):
        sha.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        sha.update(np.ascontiguousarray(tensor, dtype=tensor.dtype.newbyteorder("<")).tobytes())
    sha.update(json.dumps(parts.facts, sort_keys=True, separators=(",", ":")).encode())
    return sha.hexdigest()


def write(folder: Path, commit: Commit, keep_for_good: bool = False) -> None:
    """Writes a commit, then prunes older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = {
        "number": commit.number,
        "previous": _hash_of(folder, commit.number - 1),
        "tensors": _stored(folder, commit.parts),
        "facts": commit.parts.facts,
        "memory_tensors": {**_stored(folder, commit.memory), **commit.stored},
        "memory_facts": commit.memory.facts,
        "progress": commit.progress,
        "bound": dict(commit.bound),
        "keep": keep_for_good,
    }
    write_atomic(_path(folder, commit.number), manifest.encode(tree))
    _prune(folder)


def find(folder: Path) -> Found:
    """The newest commit that verifies, and what is wrong with newer ones.

    Raises:
        BadInput: the newest commit does not continue the one before it; somebody mixed two runs.
    """
    damaged: list[str] = []
    for path in sorted(folder.glob(MANIFESTS), reverse=True):
        try:
            read = manifest.read(path)
            commit = _commit(read)
        except Damaged as error:
            damaged.append(str(error))
            continue
        _check_chain(read)
        return Found(commit, tuple(damaged))
    return Found(None, tuple(damaged))


def newest(folder: Path) -> Commit | None:
    """The newest commit that verifies; None when there is none."""
    return find(folder).commit


def require_newest(run_dir: Path) -> Commit:
    """Like `newest`, for commands that need one. Raises `BadInput` naming the folder."""
    commit = newest(run_dir / "checkpoints")
    if commit is None:
        raise BadInput(f"{run_dir / 'checkpoints'}: holds no commit that verifies")
    return commit


def stage_start(folder: Path, stage: int) -> Commit | None:
    """The commit that a stage begins from, which ended the one before it; None when it is not there or is damaged."""
    for path in sorted(folder.glob(MANIFESTS)):
        try:
            read = manifest.read(path)
            at = read.tree["progress"]
            if read.tree["keep"] and (at["stage"], at["round"]) == (stage, 1):
                return _commit(read)
        except (Damaged, KeyError, TypeError):
            continue
    return None


def drop_after(folder: Path, number: int) -> None:
    """Removes later commits, the newest first, so that what is left is a run's beginning at any moment."""
    for path in sorted(folder.glob(MANIFESTS), reverse=True):
        if int(path.stem) > number:
            durable.remove(path)
            durable.sync_folder(folder)


def _commit(read: Manifest) -> Commit:
    bound = read.tree.get("bound", {})
    return Commit(read.parts(), read.tree["progress"], read.tree["number"], read.memory(), bound)


def _check_chain(read: Manifest) -> None:
    """A manifest names its predecessor's hash; where both are there, they must fit."""
    before = _hash_of(read.path.parent, int(read.path.stem) - 1)
    if before and read.previous and before != read.previous:
        raise BadInput(f"{read.path}: does not continue the commit before it; the folder mixes two runs")


def _hash_of(folder: Path, number: int) -> str | None:
    try:
        return manifest.read(_path(folder, number)).hash
    except Damaged:
        return None


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.json"


def _stored(folder: Path, parts: Parts) -> dict[str, str]:
    return {name: blobs.put(folder, tensor) for name, tensor in parts.tensors.items()}


def _prune(folder: Path) -> None:
    """Old manifests go first and for good, then the blobs that none of the others names."""
    paths = sorted(folder.glob(MANIFESTS))
    dropped = [path for path in paths[:-KEEP] if not _kept(path)]
    for path in dropped:
        durable.remove(path)
    if dropped:
        durable.sync_folder(folder)
    needed = set().union(*(_needed(path) for path in paths if path not in dropped))
    for blob in folder.glob(f"*{blobs.SUFFIX}"):
        if blob.stem not in needed:
            durable.remove(blob)


def _kept(path: Path) -> bool:
    """Whether a manifest says so; one that cannot be read stays for good, as evidence."""
    try:
        return bool(manifest.read(path).tree["keep"])
    except Damaged:
        return True


def _needed(path: Path) -> set[str]:
    try:
        return manifest.read(path).blobs
    except Damaged:
        return {path.stem}  # version 1's one blob
