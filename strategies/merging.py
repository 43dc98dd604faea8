"""How a round's adapters become the next one: a rule makes one of many, a server optimiser goes from the old to it.

Every method that averages has these options, and applies them to each subspace on its own, and to the layout's tail.
`merge=mean` with `server_optimizer=none` is FedAvg: the mean is the next adapter, and adapters are looked at one at a
time. The other rules look at all adapters of a subspace at once and hold them. `product` is the mean of what adapters
do, not of their factors (`strategies/product.py`); it needs no memory of its own and refuses an optimiser, whose steps
are steps of factors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from fedstrata.core.adapters import Flat, Layout
from fedstrata.core.config import StrategyConfig, require
from fedstrata.core.streaming import RunningMean
from fedstrata.strategies.optimizers import OPTIMIZERS, RATES, Moments
from fedstrata.strategies.product import product_mean
from fedstrata.strategies.rules import RULES, Rule

PRODUCT = "product"
MERGES = (*RULES, PRODUCT)


@dataclass(frozen=True)
class MergeConfig(StrategyConfig):
    """Options of every method that averages."""

    in_factors: ClassVar[bool] = False  # the method keeps numbers that belong to A and B as they are, not to B A
    named_for: ClassVar[str] = ""  # the option that the method is named for: another value would be another method

    merge: str = "mean"  # mean | median | trimmed | multikrum | geomedian | product: makes one adapter of a subspace's
    suspects: int = 1  # adapters of one subspace and round that may be hostile: trimmed and multikrum reckon with them
    server_optimizer: str = "none"  # none | fedavgm | fedadagrad | fedadam | fedyogi: how the server goes there
    server_lr: float | None = None  # η of the server's step; null: the optimiser's own, 1 or 0.01
    server_momentum: float = 0.9  # β of fedavgm
    server_beta1: float = 0.9  # β₁ of fedadam and fedyogi
    server_beta2: float = 0.99  # β₂ of fedadam and fedyogi
    server_tau: float = 1e-3  # τ beside √v: the smaller, the more every parameter moves alike

    def __post_init__(self) -> None:
        super().__post_init__()
        key = "strategy."
        merges = [name for name in MERGES if name != PRODUCT or not self.in_factors]
        require(self.merge in merges, key + "merge", " | ".join(merges), self.merge)
        require(self.suspects >= 0, key + "suspects", "at least 0", self.suspects)
        names = ("none", *OPTIMIZERS)
        require(self.server_optimizer in names, key + "server_optimizer", " | ".join(names), self.server_optimizer)
        good = self.merge != PRODUCT or self.server_optimizer == "none"
        require(good, key + "server_optimizer", "none with strategy.merge=product", self.server_optimizer)
        good = self.server_lr is None or 0 < self.server_lr < float("inf")
        require(good, key + "server_lr", "a finite number above 0, or null", self.server_lr)
        for name in ("server_momentum", "server_beta1", "server_beta2"):
            require(0 <= getattr(self, name) < 1, key + name, "at least 0 and below 1", getattr(self, name))
        good = 0 < self.server_tau < float("inf")
        require(good, key + "server_tau", "a finite number above 0", self.server_tau)
        if self.named_for:
            own, came = (getattr(who, self.named_for) for who in (type(self), self))
            require(came == own, key + self.named_for, f"{own} with strategy.name={self.name}", came)

    @property
    def averages(self) -> bool:
        return super().averages and self.merge == "mean" and self.server_optimizer == "none"

    @property
    def rate(self) -> float:
        """η."""
        return RATES[self.server_optimizer] if self.server_lr is None else self.server_lr


Whole = Callable[[Sequence[Flat], Sequence[float]], Flat]  # (adapters, weights) → one adapter


class Gathered:
    """A merge that looks at all adapters at once, and so holds them."""

    def __init__(self, whole: Whole, size: int) -> None:
        self._whole, self._size = whole, size
        self._flats: list[Flat] = []
        self._counts: list[float] = []
        self.weight = 0.0

    def add(self, flat: Flat, weight: float) -> None:
        """Raises ValueError when the weight is not above 0 or the length is another than the one that was sent."""
        if not weight > 0:
            raise ValueError(f"an adapter's weight must be above 0, got {weight}")
        if flat.size != self._size:
            raise ValueError(f"adapters of one merge have one length, got {self._size} and {flat.size}")
        self._flats.append(np.array(flat, dtype=np.float32))
        self._counts.append(weight)
        self.weight += weight

    def value(self) -> Flat:
        if not self._flats:
            raise ValueError("a merge of no adapters")
        return self._whole(self._flats, self._counts)


def by_rule(rule: Rule, start: Flat, suspects: int, flats: Sequence[Flat], counts: Sequence[float]) -> Flat:
    """A rule's merge of adapters, as their differences to the one that the clients were sent."""
    updates = (np.stack(flats) - start).astype(np.float64)
    return np.asarray((start + rule(updates, np.asarray(counts), suspects)).astype(np.float32))


class Merging:
    """One subspace's way through a round: adapters are added one at a time, and `result` is what they come to."""

    def __init__(
        self,
        options: MergeConfig,
        start: Callable[[], Flat],
        moments: Moments | None = None,
        layout: Layout | None = None,
    ) -> None:
        """start: the adapter that the clients were sent; moments: what the optimiser remembers of it, if anything;
        layout: how to read it; None: it has no factors, and its mean is taken for its product.
        """
        self._options, self._start, self._moments = options, start, moments
        self._gathered = _gathered(options, start, layout)

    @property
    def weight(self) -> float:
        """The sum of the weights so far; 0 when nothing was added."""
        return self._gathered.weight

    def add(self, flat: Flat, weight: float) -> None:
        """One more adapter. Raises ValueError when the weight is not above 0 or the length is another's."""
        self._gathered.add(flat, weight)

    def result(self) -> tuple[Flat, Moments | None]:
        """The next adapter, and what the optimiser remembers of it. Raises ValueError when nothing was added."""
        merged = self._gathered.value()
        if self._options.server_optimizer == "none":
            return merged, None
        old = self._start()
        past = self._moments or Moments(np.zeros_like(old))
        move, after = OPTIMIZERS[self._options.server_optimizer](merged - old, past, self._options)
        return old + move, after


def _gathered(options: MergeConfig, start: Callable[[], Flat], layout: Layout | None) -> RunningMean | Gathered:
    if options.merge == "mean" or (options.merge == PRODUCT and layout is None):
        return RunningMean()
    sent = start()
    if options.merge == PRODUCT and layout is not None:
        return Gathered(partial(product_mean, layout=layout), sent.size)
    return Gathered(partial(by_rule, RULES[options.merge], sent, options.suspects), sent.size)


def merge_options(options: StrategyConfig) -> MergeConfig:
    """A method's merge options; those of a method that has none are FedAvg's."""
    return options if isinstance(options, MergeConfig) else MergeConfig()
