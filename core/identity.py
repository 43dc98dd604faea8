"""Identity tokens: what a client's instructions, or one instruction, are about, as a vector."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Token:
    """μ = mean feature over `count` instructions; value is float32 [D]."""

    value: Vector
    count: int


def cosine(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """cos(a, b); 0 when one of them is the zero vector."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norms if norms > 0 else 0.0


def cosines(rows: npt.ArrayLike, columns: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """cos between every row vector of [N, D] and every row vector of [K, D], as [N, K]."""
    x, y = (_unit(np.asarray(m, dtype=np.float64)) for m in (rows, columns))
    return np.asarray(x @ y.T, dtype=np.float64)


def _unit(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    return matrix / np.where(norms > 0, norms, 1.0)


def pooled(tokens: list[Token]) -> Token:
    """Σ n_k μ_k / Σ n_k with its count; the running mean of a subspace's token (its norm stays of its first order)."""
    total = sum(token.count for token in tokens)
    value = sum((token.value.astype(np.float64) * (token.count / total) for token in tokens), np.zeros(()))
    return Token(np.asarray(value, dtype=np.float32), total)
