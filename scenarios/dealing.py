"""The laws by which rows are dealt to clients; ascending int64 indices for each client."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedstrata.core.errors import BadInput
from fedstrata.core.seeds import generator

Indices = NDArray[np.int64]
Shares = tuple[Indices, ...]
"""Per client, the ascending indices of its rows."""

TRIES = 1000
HUGE = 1e9  # beyond it a Dirichlet draw is uniform to rounding, and its gamma variates may overflow


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
    raise _never(n, clients, beta, min_size)


def dirichlet_label(labels: NDArray[np.uint64], clients: int, beta: float, seed: int, min_size: int = 1) -> Shares:
    """Label skew: the rows of each label are dealt by a p ~ Dirichlet(beta · 1) of its own.

    Yurochkin et al. 2019 (arXiv 1905.12022) and Hsu et al. 2019 (arXiv 1909.06335). Labels count in the order of
    their first row, so that their numbers do not matter.

    Raises:
        BadInput: as `dirichlet_quantity`.
    """
    n = len(labels)
    _check_enough(n, clients, min_size)
    rng, groups = generator(seed, "dirichlet-label", n, clients), group(labels)
    owner = np.zeros(n, dtype=np.int64)
    for _ in range(TRIES):
        for rows in groups:
            sizes = largest_remainder(_proportions(rng, clients, beta), len(rows))
            owner[rng.permutation(rows)] = np.repeat(np.arange(clients), sizes)
        held = np.bincount(owner, minlength=clients)
        if held.min() >= min_size:
            return _deal(np.argsort(owner, kind="stable"), held)
    raise _never(n, clients, beta, min_size)


def iid(n: int, clients: int, seed: int, min_size: int = 1) -> Shares:
    """Shuffled rows in equal parts; sizes differ by one at most. Raises `BadInput` for too few rows."""
    _check_enough(n, clients, min_size)
    return _deal(generator(seed, "iid", n, clients).permutation(n), largest_remainder(np.full(clients, 1 / clients), n))


def by_source(sources: NDArray[np.uint64], order: Sequence[int] | Indices) -> Shares:
    """All rows of a source go to one client: the largest source first, to the client with the fewest rows so far.

    `order` lists the clients; of clients with equally many rows its first one is served.
    """
    hands: list[list[Indices]] = [[] for _ in order]
    sizes = np.zeros(len(hands), dtype=np.int64)
    ranked = np.asarray(order)
    for rows in sorted(group(sources), key=len, reverse=True):  # stable: equally large ones by first row
        client = int(ranked[np.argmin(sizes[ranked])])
        hands[client].append(rows)
        sizes[client] += len(rows)
    return tuple(np.sort(np.concatenate(hand)) if hand else np.zeros(0, np.int64) for hand in hands)


def group(labels: NDArray[np.uint64]) -> list[Indices]:
    """The ascending rows of each label; labels in the order of their first row.

    >>> [rows.tolist() for rows in group(np.array([7, 3, 7], dtype=np.uint64))]
    [[0, 2], [1]]
    """
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order])) + 1
    return sorted(np.split(order.astype(np.int64), starts), key=lambda rows: int(rows[0]))


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


def check_sizes(shares: Shares, min_size: int) -> Shares:
    """The shares, if every client has `min_size` rows. Raises `BadInput` naming the first that has not."""
    for client, rows in enumerate(shares):
        if len(rows) < min_size:
            raise BadInput(
                f"partition: client {client} must hold at least {min_size} rows, got {len(rows)}; lower "
                "partition.min_size or take fewer federation.clients"
            )
    return shares


def _proportions(rng: np.random.Generator, clients: int, beta: float) -> NDArray[np.float64]:
    """One finite draw; a tiny beta can round all gamma variates to nothing."""
    for _ in range(TRIES):
        drawn = rng.dirichlet(np.full(clients, min(beta, HUGE)))
        if np.isfinite(drawn).all() and drawn.sum() > 0:
            return drawn
    raise BadInput(f"partition: beta={beta:g} is too small to draw from; raise it")


def _deal(order: NDArray[np.int64], sizes: NDArray[np.int64]) -> Shares:
    return tuple(np.sort(hand) for hand in np.split(order, np.cumsum(sizes)[:-1]))


def _never(n: int, clients: int, beta: float, min_size: int) -> BadInput:
    return BadInput(
        f"partition: none of {TRIES} Dirichlet draws with beta={beta:g} gave each of {clients} clients at least "
        f"{min_size} of {n} rows; raise beta, lower partition.min_size or take fewer federation.clients"
    )


def _check_enough(n: int, clients: int, min_size: int) -> None:
    if n < clients * min_size:
        raise BadInput(
            f"partition: {clients} clients with at least {min_size} rows each need {clients * min_size} training rows, "
            f"got {n}; lower partition.min_size or take fewer federation.clients"
        )
