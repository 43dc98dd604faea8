"""One atomic commit per round: a safetensors blob and a numbered manifest that names its hash.

The blob is written first, the manifest last; both go to a temporary name, are flushed to the disk and renamed. The
newest manifest whose blob has the hash it names is where the run stands.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from fedstrata.core.errors import BadInput
from fedstrata.strategies.base import Parts

KEEP = 2  # newest commits kept; ends of stages are kept for good


@dataclass(frozen=True)
class Commit:
    """What a commit holds: the strategy's state and the federation loop's progress."""

    parts: Parts
    progress: dict[str, Any]
    number: int


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
    blob = save({name: np.ascontiguousarray(tensor) for name, tensor in commit.parts.tensors.items()})
    manifest = {
        "version": 1,
        "number": commit.number,
        "blob": hashlib.sha256(blob).hexdigest(),
        "facts": commit.parts.facts,
        "progress": commit.progress,
        "keep": keep_for_good,
    }
    write_atomic(folder / f"{commit.number:06d}.safetensors", blob)
    write_atomic(folder / f"{commit.number:06d}.json", json.dumps(manifest, indent=1).encode())
    _prune(folder)


def newest(folder: Path) -> Commit | None:
    """The newest commit that verifies; None when there is none."""
    for path in sorted(folder.glob("[0-9]*.json"), reverse=True):
        commit = _read(path)
        if commit is not None:
            return commit
    return None


def require_newest(run_dir: Path) -> Commit:
    """Like `newest`, for commands that need one. Raises `BadInput` naming the folder."""
    commit = newest(run_dir / "checkpoints")
    if commit is None:
        raise BadInput(f"{run_dir / 'checkpoints'}: holds no commit that verifies")
    return commit


def _read(path: Path) -> Commit | None:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        blob = path.with_suffix(".safetensors").read_bytes()
        if hashlib.sha256(blob).hexdigest() != manifest["blob"]:
            return None
        return Commit(Parts(load(blob), manifest["facts"]), manifest["progress"], manifest["number"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # torn or foreign: an older commit stands in for it


def _prune(folder: Path) -> None:
    paths = sorted(folder.glob("[0-9]*.json"))
    for path in paths[:-KEEP]:
        if not _kept(path):
            path.unlink()
            path.with_suffix(".safetensors").unlink(missing_ok=True)


def _kept(path: Path) -> bool:
    """Whether a manifest says so; one that cannot be read stays for good, as evidence."""
    try:
        return bool(json.loads(path.read_text(encoding="utf-8"))["keep"])
    except (ValueError, KeyError, TypeError):
        return True


def write_atomic(path: Path, data: bytes) -> None:
    """Readers see the old file or the whole new one, also after a power cut."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
