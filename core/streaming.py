"""Means over adapters that come one at a time: memory for one mean and one adapter, however many there are."""

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedstrata.core.adapters import Flat

if TYPE_CHECKING:
    from torch import Tensor

STEP = 8192  # numbers per block: small enough for the first cache, and for BLAS not to share it out among threads


class RunningMean:
    """mean ← mean + (x − mean) · n / N, in float32 and in the order in which adapters are added.

    The order fixes the bits, so callers add in ascending order of partitions. One adapter, or several equal ones, come
    out bit for bit. The relative distance to the mean in float64 stays below 1e-6 for hundreds of adapters.

    Attributes:
        weight: the sum of the weights so far; 0 when nothing was added.
    """

    def __init__(self) -> None:
        self._mean: Flat | None = None
        self.weight = 0.0

    def add(self, flat: Flat, weight: float) -> None:
        """Raises ValueError when the weight is not above 0 or the length is another than the first one's."""
        if not weight > 0:
            raise ValueError(f"an adapter's weight must be above 0, got {weight}")
        self.weight += weight
        if self._mean is None:
            self._mean = np.array(flat, dtype=np.float32)
            return
        if flat.shape != self._mean.shape:
            raise ValueError(f"adapters of one mean have one length, got {self._mean.size} and {flat.size}")
        _tensor(self._mean).lerp_(_tensor(flat), weight / self.weight)

    def value(self) -> Flat:
        """The mean of what was added so far, float32. Raises ValueError when that is nothing."""
        if self._mean is None:
            raise ValueError("a mean of no adapters")
        return self._mean


def _tensor(flat: Flat) -> "Tensor":
    """The same memory for torch, whose lerp runs at the speed of a copy; numpy's three passes take twice as long."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of memory that may only be read, as the other side of a lerp is
        return torch.from_numpy(flat)


def distance(flat: npt.NDArray[np.float32], start: npt.NDArray[np.float32]) -> float:
    """The norm of flat − start, summed in float64 without a copy of either."""
    total = 0.0
    for block in blocks(flat.size):
        moved = flat[block].astype(np.float64) - start[block]
        total += float(moved @ moved)
    return float(np.sqrt(total))


def blocks(size: int, step: int = STEP) -> Iterator[slice]:
    """Cuts 0 … size into slices of `step`."""
    return (slice(begin, min(begin + step, size)) for begin in range(0, size, step))
