"""Saved partitions: one JSON file that says which client holds which row, and of which data."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedstrata.core.errors import BadInput
from fedstrata.scenarios.dealing import Shares
from fedstrata.scenarios.jsonfile import brief

VERSION = 1


def save_partition(path: Path, tasks: Mapping[str, tuple[str, Shares]]) -> None:
    """Writes {task: (digest of its training rows, shares)}; the file appears whole or not at all."""
    clients = len(next(iter(tasks.values()))[1])
    blocks = {
        name: {"digest": digest, "rows": sum(map(len, shares)), "shares": [rows.tolist() for rows in shares]}
        for name, (digest, shares) in tasks.items()
    }
    half = path.with_name(f".{path.name}.part")
    half.write_text(json.dumps({"version": VERSION, "clients": clients, "tasks": blocks}), encoding="utf-8")
    half.replace(path)


def load_saved(path: Path, task: str, digest: str, rows: int, clients: int) -> Shares:
    """One task's shares.

    Raises:
        BadInput: no such file, not a saved partition, of other data or another number of clients, or a row that is
            given twice, to nobody, or does not exist.
    """
    block = _block(path, task, clients)
    where = f"{path}: tasks.{task}"
    if block["digest"] != digest:
        raise BadInput(f"{where}: was saved for other training rows (digest {str(block['digest'])[:16]} …)")
    shares = block["shares"]
    good = isinstance(shares, list) and all(isinstance(hand, list) for hand in shares)
    if not good or not all(type(row) is int for hand in shares for row in hand):
        raise BadInput(f"{where}: shares must be a list of lists of row numbers")
    if len(shares) != clients:
        raise BadInput(f"{where}: shares must have one list for each of {clients} clients, got {len(shares)}")
    wrong = [row for hand in shares for row in hand if not 0 <= row < rows]
    if wrong:
        raise BadInput(f"{where}: rows must be between 0 and {rows - 1}, got {brief(wrong[0])}")
    found = tuple(np.sort(np.array(hand, dtype=np.int64)) for hand in shares)
    counts = np.bincount(np.concatenate(found), minlength=rows)
    if (counts != 1).any():
        row = int(np.flatnonzero(counts != 1)[0])
        raise BadInput(f"{where}: every row must be at exactly one client, row {row} is at {int(counts[row])}")
    return found


def sha256_of(path: Path) -> str:
    """Of the file's content; a file that cannot be read is reported by whoever loads it."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def _block(path: Path, task: str, clients: int) -> Mapping[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not a readable partition file: {error}") from error
    tasks = tree.get("tasks") if isinstance(tree, dict) else None
    if not isinstance(tree, dict) or tree.get("version") != VERSION or not isinstance(tasks, dict):
        raise BadInput(f"{path}: must hold a saved partition of version {VERSION} (fedstrata preview --partition)")
    if tree.get("clients") != clients:
        raise BadInput(f"{path}: was saved for {tree.get('clients')} clients, federation.clients is {clients}")
    block = tasks.get(task)
    if not isinstance(block, dict) or not {"digest", "shares"} <= set(block):
        raise BadInput(f"{path}: tasks must have the task {task} with digest and shares, got {', '.join(tasks)[:80]}")
    return block
