"""Server optimisers: a round's merged adapter is a direction to go, not the place to be.

Δ = merged − adapter, taken for a descent direction. FedAvgM: Hsu et al. 2019, arXiv 1909.06335; FedAdagrad, FedAdam,
FedYogi: Reddi et al., "Adaptive Federated Optimization", ICLR 2021, arXiv 2003.00295.

The arithmetic is that of Flower's classes, which differs from the paper's algorithm 2 in two things: v starts at 0,
not at τ², and FedAdam's rate is corrected for the bias of its moments, with the exponent t + 1. Flower counts t in
rounds of the federation and refuses an adapter that was not there in the first one. Here every subspace has moments
and a count of its own, which begin when it is first merged: t is the number of rounds in which it was.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fedstrata.core.adapters import Flat

RATES: Mapping[str, float] = {"fedavgm": 1.0, "fedadagrad": 1e-2, "fedadam": 1e-2, "fedyogi": 1e-2}  # η where null


@dataclass(frozen=True)
class Moments:
    """What an optimiser remembers of one adapter: m, v (empty with FedAvgM), and the rounds that it has seen."""

    first: Flat
    second: Flat = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    steps: int = 0


Move = tuple[Flat, Moments]


def fedavgm(delta: Flat, past: Moments, options: Any) -> Move:
    """m ← βm + Δ; the move is η m."""
    first = options.server_momentum * past.first + delta
    return options.rate * first, Moments(first, steps=past.steps + 1)


def fedadagrad(delta: Flat, past: Moments, options: Any) -> Move:
    """v ← v + Δ²; the move is η Δ / (√v + τ)."""
    return _adapted(delta, _second(past) + delta**2, options.rate, past, options)


def fedadam(delta: Flat, past: Moments, options: Any) -> Move:
    """m ← β₁m + (1 − β₁)Δ, v ← β₂v + (1 − β₂)Δ²; the move is η' m / (√v + τ), η' = η √(1 − β₂ᵗ⁺¹) / (1 − β₁ᵗ⁺¹)."""
    b1, b2, power = options.server_beta1, options.server_beta2, past.steps + 2
    rate = options.rate * (1 - b2**power) ** 0.5 / (1 - b1**power)
    return _adapted(_mixed(past, delta, b1), b2 * _second(past) + (1 - b2) * delta**2, rate, past, options)


def fedyogi(delta: Flat, past: Moments, options: Any) -> Move:
    """m as FedAdam's, v ← v − (1 − β₂) Δ² sign(v − Δ²); the move is η m / (√v + τ)."""
    square, second = delta**2, _second(past)
    second = second - (1 - options.server_beta2) * square * np.sign(second - square)
    return _adapted(_mixed(past, delta, options.server_beta1), second, options.rate, past, options)


OPTIMIZERS: Mapping[str, Callable[[Flat, Moments, Any], Move]] = {
    "fedavgm": fedavgm,
    "fedadagrad": fedadagrad,
    "fedadam": fedadam,
    "fedyogi": fedyogi,
}


def _mixed(past: Moments, delta: Flat, beta: float) -> Flat:
    return beta * past.first + (1 - beta) * delta


def _second(past: Moments) -> Flat:
    return past.second if past.second.size else np.zeros_like(past.first)


def _adapted(first: Flat, second: Flat, rate: float, past: Moments, options: Any) -> Move:
    return rate * first / (np.sqrt(second) + options.server_tau), Moments(first, second, past.steps + 1)


def packed(moments: Moments | None, prefix: str = "") -> dict[str, npt.NDArray[Any]]:
    """Moments as tensors of a commit; none where there are none."""
    if moments is None:
        return {}
    steps = np.array([moments.steps], dtype=np.int64)
    return {f"{prefix}first": moments.first, f"{prefix}second": moments.second, f"{prefix}steps": steps}


def unpacked(tensors: Mapping[str, npt.NDArray[Any]], prefix: str = "") -> Moments | None:
    """The inverse of `packed`."""
    if f"{prefix}steps" not in tensors:
        return None
    return Moments(tensors[f"{prefix}first"], tensors[f"{prefix}second"], int(tensors[f"{prefix}steps"][0]))
