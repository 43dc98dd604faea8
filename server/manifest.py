"""One commit's manifest: which blobs it is made of, the hash of the manifest before it, and its own.

Version 1, which earlier releases wrote, names one blob beside it, has no hashes of manifests and is still read.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.numpy import load

from fedstrata.server import blobs
from fedstrata.strategies.base import Parts

VERSION = 2


class Damaged(ValueError):
    """A commit that does not verify: torn, changed or foreign."""


@dataclass(frozen=True)
class Manifest:
    """A manifest as it was read; `hash` is right, the blobs have not been looked at yet."""

    path: Path
    tree: Mapping[str, Any]
    hash: str = field(default="")

    @property
    def previous(self) -> str | None:
        """The hash of the manifest before this one; None where it names none."""
        found = self.tree.get("previous")
        return str(found) if found else None

    @property
    def blobs(self) -> set[str]:
        """The names (without suffix) of the blobs that this commit needs."""
        if self.tree["version"] == 1:
            return {self.path.stem}
        return {*self.tree["tensors"].values(), *self.tree["memory_tensors"].values()}

    def parts(self) -> Parts:
        """The strategy's state. Raises `Damaged` naming the blob."""
        if self.tree["version"] == 1:
            return Parts(_single(self.path, self.tree["blob"]), self.tree["facts"])
        return Parts(self._tensors("tensors"), self.tree["facts"])

    def memory(self) -> Parts:
        """What is kept beside the state; empty in version 1. Raises `Damaged` naming the blob."""
        if self.tree["version"] == 1:
            return Parts({})
        return Parts(self._tensors("memory_tensors"), self.tree["memory_facts"])

    def _tensors(self, key: str) -> dict[str, Any]:
        try:
            return {name: blobs.get(self.path.parent, blob) for name, blob in self.tree[key].items()}
        except (OSError, ValueError, KeyError) as error:
            raise Damaged(f"{self.path.name}: {error}") from error


def identity(tree: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its own hash, as canonical JSON."""
    rest = {key: value for key, value in tree.items() if key != "hash"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def encode(tree: Mapping[str, Any]) -> bytes:
    """The bytes of a manifest of the present version; its own hash is added."""
    whole = json.loads(json.dumps({"version": VERSION, **tree}))  # keys become strings, which sort in another order
    return json.dumps({**whole, "hash": identity(whole)}, indent=1).encode()


def read(path: Path) -> Manifest:
    """A manifest whose own hash is right. Raises `Damaged` naming the file."""
    try:
        tree = json.loads(path.read_bytes())
        found = identity(tree)
        good = tree["version"] == 1 or (tree["version"] == VERSION and tree["hash"] == found)
        if not good or tree["number"] != int(path.stem):
            raise ValueError("its hash or its number is another")
        _ = tree["facts"], tree["progress"], tree["keep"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path.name}: {error}") from error
    return Manifest(path, tree, found)


def _single(path: Path, expected: str) -> dict[str, Any]:
    """Version 1's one blob."""
    blob = path.with_suffix(blobs.SUFFIX)
    try:
        data = blob.read_bytes()
        if hashlib.sha256(data).hexdigest() != expected:
            raise ValueError("its SHA-256 is another")
        return load(data)
    except (OSError, ValueError) as error:
        raise Damaged(f"{blob.name}: {error}") from error
