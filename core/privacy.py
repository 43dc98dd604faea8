"""Differential privacy: clipping, Gaussian noise that can be drawn again, and what releases cost in epsilon.

The Gaussian mechanism adds N(0, (z · sensitivity)²) to every number of what is released; z is the noise multiplier, and
epsilon depends on z, δ and the number of releases alone. `docs/privacy.md` says what the figures mean.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedstrata.core.config import MULTIPLIER, UPLOADS, StrategyConfig, multiplier, require
from fedstrata.core.errors import BadInput

Matrix = npt.NDArray[np.float64]
TOKENS = ("text", "image", "both")
LEAST = "FEDSTRATA_TOKEN_MIN_SAMPLES"  # a client's own limit; it may only be higher than the server's


@dataclass(frozen=True)
class TokenConfig(StrategyConfig):
    """Options of every method that asks for identity tokens."""

    token: str = "text"  # text | image | both: what of an instruction its identity is made of
    token_upload: str = "float32"  # float32 | bfloat16 | int8: how it travels
    token_min_samples: int = 1  # a client with fewer instructions sends no token, and is listed
    token_noise: float = 0.0  # z of the Gaussian noise that a client adds to its token; 0: none
    token_clip: float | None = None  # largest norm of one instruction's feature; null: the encoder's own, with noise
    token_delta: float = 1e-5  # δ of the epsilon that is reported

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.token in TOKENS, "strategy.token", " | ".join(TOKENS), self.token)
        key = "strategy.token_"
        require(self.token_upload in UPLOADS, key + "upload", " | ".join(UPLOADS), self.token_upload)
        require(self.token_min_samples >= 1, key + "min_samples", "at least 1", self.token_min_samples)
        require(multiplier(self.token_noise), key + "noise", MULTIPLIER, self.token_noise)
        good = self.token_clip is None or 0 < self.token_clip < float("inf")
        require(good, key + "clip", "a finite number above 0, or null", self.token_clip)
        require(0 < self.token_delta < 1, key + "delta", "above 0 and below 1", self.token_delta)


def token_options(options: StrategyConfig) -> TokenConfig:
    """A method's token options; those of a method that has none are the defaults."""
    return options if isinstance(options, TokenConfig) else TokenConfig()


def own_least(options: StrategyConfig) -> int:
    """The fewest instructions that this client sends a token for: the server's limit, or its own where that is higher.

    Raises:
        BadInput: the environment's is not a whole number of at least 0.
    """
    text = os.environ.get(LEAST, "0")
    if not text.isdecimal():
        raise BadInput(f"{LEAST}: must be a whole number of at least 0, got {text!r}")
    return max(token_options(options).token_min_samples, int(text))


def clipped(features: npt.ArrayLike, bound: float) -> Matrix:
    """The rows of [N, D], those that are longer than `bound` scaled down to it."""
    rows = np.asarray(features, dtype=np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows * (bound / np.maximum(norms, bound)), dtype=np.float64)


def mean_sensitivity(bound: float, count: int) -> float:
    """How far the mean of `count` rows of norm ≤ bound can move when one row is replaced by another: 2 · bound / count.

    The count is public and the same on both sides. Were a row only made zero, with the count kept, it would be half.
    """
    return 2 * bound / count


def gaussian(key: bytes, names: Sequence[str | int | float], size: int) -> Matrix:
    """[size] standard normal numbers, a pure function of (key, names).

    SHAKE-256 by Box and Muller's method: without the key nobody can tell them from chance or draw them again.
    """
    head = json.dumps([key.hex(), *names]).encode()
    stream = hashlib.shake_256(head).digest(16 * math.ceil(size / 2))
    uniform = ((np.frombuffer(stream, dtype="<u8") >> np.uint64(11)) + 0.5) * 2.0**-53  # above 0, at most 1
    radius, angle = np.sqrt(-2 * np.log(uniform[0::2])), 2 * np.pi * uniform[1::2]
    return np.asarray(np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size], dtype=np.float64)


def epsilon(noise: float, releases: int, delta: float) -> float:
    """ε at δ of `releases` Gaussian releases with noise multiplier z: one release with z / √releases, exactly.

    By dp-accounting's privacy loss of the Gaussian mechanism, whose δ(ε) is exact (Balle and Wang 2018, arXiv
    1805.06530). No amplification by sampling is claimed.

    Raises:
        ValueError: no noise, a negative number of releases, or a δ that is not between 0 and 1.
    """
    if not (noise > 0 and releases >= 0 and 0 < delta < 1):
        raise ValueError(f"expected z > 0, releases ≥ 0 and 0 < δ < 1, got {noise}, {releases} and {delta}")
    if not releases:
        return 0.0
    # here: it takes seconds to import, and most runs need none of it
    from dp_accounting.pld import common, privacy_loss_mechanism  # type: ignore[import-untyped]  # it brings no types

    sigma = noise / math.sqrt(releases)
    rho = 1 / (2 * sigma**2)  # zero-concentrated: (Bun and Steinke 2016) gives more than the smallest ε
    most = rho + 2 * math.sqrt(rho * math.log(1 / delta))
    loss = privacy_loss_mechanism.GaussianPrivacyLoss(sigma)
    search = common.BinarySearchParameters(0.0, most, tolerance=1e-9 * most)
    return float(common.inverse_monotone_function(loss.get_delta_for_epsilon, delta, search))
