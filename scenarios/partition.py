"""Who holds which training row: pure functions of (labels or their number, clients, seed).

Every row lands at exactly one client. A new kind is one function of (labels, clients, rule, seed) in `PARTITIONS`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedstrata.core.config import require
from fedstrata.core.errors import BadInput, unknown
from fedstrata.core.seeds import generator

Shares = tuple[tuple[int, ...], ...]
"""Per client, the ascending indices of its rows."""

TRIES = 1000
HUGE = 1e9  # beyond it a Dirichlet draw is uniform to rounding, and its gamma variates may overflow


@dataclass(frozen=True)
class PartitionRule:
    """A scenario file's `partition` block. `beta` concentrates a Dirichlet draw: smaller means more skew."""

    kind: str = "dirichlet"
    beta: float = 1.0
    min_size: int = 1

    def __post_init__(self) -> None:
        if self.kind not in PARTITIONS:
            raise unknown("kind", self.kind, PARTITIONS)
        require(0 < self.beta < float("inf"), "beta", "a finite number above 0", self.beta)
        require(self.min_size >= 1, "min_size", "at least 1 (every client has data)", self.min_size)


def dirichlet_quantity(n: int, clients: int, beta: float, seed: int, min_size: int = 1) -> Shares:
    """FCIT's law (arXiv 2503.12897, section 3): client k holds a share p_k of shuffled rows, p ~ Dirichlet(beta · 1).

    The published code floors each share and drops the remainder; here the largest remainders get it.

    Raises:
        BadInput: `n` rows cannot, or by this law practically never, give every client `min_size` of them.
    """
    _check_enough(n, clients, min_size)
    rng = generator(seed, "dirichlet-quantity", n, clients)
    for _ in range(TRIES):
        proportions = rng.dirichlet(np.full(clients, min(beta, HUGE)))
        if np.isfinite(proportions).all() and (sizes := largest_remainder(proportions, n)).min() >= min_size:
            return _deal(rng.permutation(n), sizes)
    raise BadInput(
        f"partition: none of {TRIES} Dirichlet draws with beta={beta:g} gave each of {clients} clients at least "
        f"{min_size} of {n} rows; raise beta, lower partition.min_size or take fewer federation.clients"
    )


def iid(n: int, clients: int, seed: int, min_size: int = 1) -> Shares:
    """Shuffled rows in equal parts; sizes differ by one at most. Raises `BadInput` for too few rows."""
    _check_enough(n, clients, min_size)
    return _deal(generator(seed, "iid", n, clients).permutation(n), largest_remainder(np.full(clients, 1 / clients), n))


def largest_remainder(proportions: NDArray[np.float64], n: int) -> NDArray[np.int64]:
    """Whole sizes [clients] that add up to `n`, each within one of `proportions · n`; ties go to the first.

    >>> largest_remainder(np.array([0.5, 0.3, 0.2]), 4).tolist()
    [2, 1, 1]
    """
    ideal = proportions / proportions.sum() * n
    sizes: NDArray[np.int64] = np.floor(ideal).astype(np.int64)
    order = np.argsort(sizes - ideal, kind="stable")
    sizes[order[: n - int(sizes.sum())]] += 1
    return sizes


def _deal(order: NDArray[np.int64], sizes: NDArray[np.int64]) -> Shares:
    hands = np.split(order, np.cumsum(sizes)[:-1])
    return tuple(tuple(sorted(hand.tolist())) for hand in hands)


def _check_enough(n: int, clients: int, min_size: int) -> None:
    if n < clients * min_size:
        raise BadInput(
            f"partition: {clients} clients with at least {min_size} rows each need {clients * min_size} training rows, "
            f"got {n}; lower partition.min_size or take fewer federation.clients"
        )


def _dirichlet(labels: Sequence[str], clients: int, rule: PartitionRule, seed: int) -> Shares:
    return dirichlet_quantity(len(labels), clients, rule.beta, seed, rule.min_size)


def _iid(labels: Sequence[str], clients: int, rule: PartitionRule, seed: int) -> Shares:
    return iid(len(labels), clients, seed, rule.min_size)


PARTITIONS: Mapping[str, Callable[[Sequence[str], int, PartitionRule, int], Shares]] = {
    "dirichlet": _dirichlet,
    "iid": _iid,
}
