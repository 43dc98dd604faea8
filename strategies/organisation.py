"""DISCO's dynamic knowledge organization (DKO): which subspace a client trains, and what a round makes of the cache.

Guo et al., "Federated Continual Instruction Tuning", ICCV 2025, arXiv 2503.12897. Pure functions of tokens, updates and
the state; `disco.py` has the messages around them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

from fedstrata.core.adapters import Flat, Layout
from fedstrata.core.identity import Token, cosines, pooled
from fedstrata.strategies.merging import MergeConfig, Merging
from fedstrata.strategies.optimizers import Moments

Likeness = Callable[[npt.ArrayLike, npt.ArrayLike], npt.NDArray[np.float64]]  # of rows with rows
FEDAVG = MergeConfig()


@dataclass(frozen=True)
class Subspace:
    """One piece of the server's knowledge; `count` is N_j, the instructions folded into the token so far."""

    adapter: Flat
    token: Token
    moments: Moments | None = None  # the server optimiser's of this subspace, if there is one


@dataclass(frozen=True)
class DiscoState:
    """The cache. It grows without limit; only filled subspaces are in it, with the layout's tail where it is theirs."""

    subspaces: tuple[Subspace, ...] = ()
    shared: Flat = field(default_factory=lambda: np.zeros(0, np.float32), compare=False)  # the layout's tail, for all
    shared_moments: Moments | None = None

    def tokens(self) -> npt.NDArray[np.float32]:
        """[K, D]; [0, 0] while the cache is empty."""
        rows = [subspace.token.value for subspace in self.subspaces]
        return np.stack(rows) if rows else np.zeros((0, 0), dtype=np.float32)


@dataclass(frozen=True)
class Update:
    """What one participant sent back for its subspace."""

    subspace: int
    adapter: Flat
    token: Token
    shared: Flat = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    weight: float | None = None  # of the adapter in its mean; None: the token's count


def match(
    token: npt.ArrayLike, tokens: npt.NDArray[np.float32], tau: float, likeness: Likeness = cosines
) -> int | None:
    """j* = argmax_j cos(μ, μ_j) if that cosine is at least τ, else None: the token is new."""
    if not len(tokens):
        return None
    similar = likeness(np.atleast_2d(np.asarray(token)), tokens)[0]
    best = int(similar.argmax())
    return best if similar[best] >= tau else None


def group(tokens: npt.ArrayLike, tau: float, likeness: Likeness = cosines) -> list[list[int]]:
    """Groups new tokens [N, D] by single linkage at τ, in the order of their first members.

    The rule for chains: a ~ b and b ~ c put a, b and c into one group even where a ≁ c.
    """
    near = likeness(tokens, tokens) >= tau
    label = list(range(len(near)))
    for i in range(len(near)):
        for j in range(i):
            if near[i, j] and label[i] != label[j]:
                old, new = max(label[i], label[j]), min(label[i], label[j])
                label = [new if value == old else value for value in label]
    return [[i for i, value in enumerate(label) if value == first] for first in sorted(set(label))]


def place(
    tokens: Sequence[Token],
    cache: npt.NDArray[np.float32],
    tau: float,
    min_open: int,
    likeness: Likeness = cosines,
) -> list[int | None]:
    """For every participant the subspace it trains: an old one, a new one (index ≥ K), or None: it sits out.

    A mean over one or two instructions can fall below τ of its own task, so a group of fewer than `min_open`
    instructions opens nothing.
    """
    found = [match(token.value, cache, tau, likeness) for token in tokens]
    unmatched = [index for index, subspace in enumerate(found) if subspace is None]
    opened = len(cache)
    for members in group(np.stack([tokens[i].value for i in unmatched]), tau, likeness) if unmatched else []:
        if sum(tokens[unmatched[m]].count for m in members) >= min_open:
            for member in members:
                found[unmatched[member]] = opened
            opened += 1
    return found


def organise(
    state: DiscoState,
    updates: Iterable[Update],
    options: MergeConfig = FEDAVG,
    start: Callable[[int], Flat] | None = None,
    layout: Layout | None = None,
) -> DiscoState:
    """Per subspace the merge of its updates, n_k their weights; μ_j ← (N_j μ_j + Σ n_k μ_k) / (N_j + Σ n_k).

    One pass over the updates; a mean holds none of them. The tail is merged from all of them, whatever their subspace:
    FCIT's published projector is FedAvg's alone. Subspaces without an update keep their bits; new ones are appended in
    the order of their indices, and one that nobody filled leaves no gap.

    start: the adapter that a subspace's clients were sent; needed for new ones, unless the mean is their adapter.
    layout: how a subspace's adapter is read; needed for a merge of products.
    """
    known = state.subspaces
    start = start or (lambda index: known[index].adapter)
    merges: dict[int, Merging] = {}
    tokens: dict[int, list[Token]] = {}
    shared = Merging(options, lambda: state.shared, state.shared_moments)
    for update in updates:
        weight, index = update.token.count if update.weight is None else update.weight, update.subspace
        if index not in merges:
            moments = known[index].moments if index < len(known) else None
            merges[index] = Merging(options, partial(start, index), moments, layout)
        merges[index].add(update.adapter, weight)
        tokens.setdefault(index, []).append(update.token)
        if state.shared.size:
            shared.add(update.shared, weight)
        del update  # before the next one is loaded
    subspaces = list(known)
    for index in sorted(merges):
        adapter, moments = merges[index].result()
        before = [known[index].token] if index < len(known) else []
        subspaces[index : index + 1] = [Subspace(adapter, pooled([*before, *tokens[index]]), moments)]
    tail = shared.result() if shared.weight else (state.shared, state.shared_moments)
    return DiscoState(tuple(subspaces), *tail)
