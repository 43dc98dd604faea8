"""Tensors as files named by what is in them: equal ones are stored once, and a changed bit shows."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load, save

from fedstrata.core import durable

SUFFIX = ".safetensors"
KEY = "tensor"


def put(folder: Path, tensor: npt.NDArray[Any]) -> str:
    """Stores a tensor unless the folder has it, whole, already; returns the SHA-256 of its file."""
    data = save({KEY: np.require(tensor, requirements="C")})
    name = hashlib.sha256(data).hexdigest()
    if not _whole(folder, name):
        durable.write_atomic(folder / f"{name}{SUFFIX}", data)
    return name


def get(folder: Path, name: str) -> npt.NDArray[Any]:
    """A tensor by its name. Raises OSError when it is missing, ValueError when it is not what it was."""
    path = folder / f"{name}{SUFFIX}"
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != name:
        raise ValueError(f"{path.name}: its SHA-256 is another")
    return load(data)[KEY]


def _whole(folder: Path, name: str) -> bool:
    try:
        return hashlib.sha256((folder / f"{name}{SUFFIX}").read_bytes()).hexdigest() == name
    except OSError:
        return False
