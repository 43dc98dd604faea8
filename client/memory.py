"""A client's memory between its rounds, in the context that Flower gives back to it; `keep.py` puts that on a disk."""

from collections.abc import Mapping

import numpy as np
from flwr.app import Context

from fedstrata.core import codec, records
from fedstrata.core.adapters import Flat
from fedstrata.core.records import TrainTask

MEMORY = "memory"  # a client's own record in its context; it never travels to the server


def encoded(
    kind: str, task: TrainTask, flat: Flat, memory: Mapping[str, np.ndarray]
) -> tuple[codec.Parts | None, Mapping[str, np.ndarray]]:
    """The adapter as `federation.upload` has it (None: whole) and the client's memory, with what rounding left behind.

    That is remembered per subspace and added to the client's next update of the same subspace.
    """
    if kind == "float32":
        return None, memory
    name = f"upload.{task.options.get('subspace', 0)}"
    before = memory.get(name)
    residual = before if before is not None and before.shape == flat.shape else None
    parts, left = codec.encode(flat, task.flat, residual, kind)
    return parts, {**memory, name: left}


def remembered(context: Context) -> dict[str, np.ndarray]:
    """What a client remembers of its earlier rounds, {name: array}; its context survives processes and actors."""
    return {name: array.numpy() for name, array in context.state.array_records.get(MEMORY, {}).items()}


def remember(context: Context, memory: Mapping[str, np.ndarray]) -> None:
    """Keeps it in the context. A round that went astray is not remembered: it would spoil all later ones."""
    if memory and all(np.isfinite(value).all() for value in memory.values()):
        context.state[MEMORY] = records.arrays(**memory)
