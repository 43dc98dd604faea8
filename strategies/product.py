"""Averaging low-rank adapters as what they do: mean of the products B A, not of the factors.

(Q A, B Qᵀ) is the same adapter as (A, B) for every orthogonal Q, so a mean of factors depends on a gauge that no check
of norms can see, and an update may poison it at no cost. The mean of the products does not. Its rank is up to N·r; the
best approximation of rank r comes from a singular value decomposition of a small core, without ever forming an
[out, in] matrix.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedstrata.core.adapters import Flat, Layout

Matrix = npt.NDArray[np.float64]
Factors = tuple[Matrix, Matrix]


def product_mean(flats: Sequence[Flat], weights: Sequence[float], layout: Layout) -> Flat:
    """The rank-r adapter nearest to Σ w_k B_k A_k / Σ w_k, layer by layer.

    What is behind A and B (a dense tail, dora's magnitudes, all of ia3) is averaged as it is.

    Raises:
        ValueError: no weight above 0, or not one weight per adapter.
    """
    if len(flats) != len(weights) or not sum(weights) > 0:
        raise ValueError(f"expected one weight per adapter with a sum above 0, got {list(weights)}")
    share = np.asarray(weights, dtype=np.float64) / sum(weights)
    views, rank = [layout.split(flat) for flat in flats], layout.rank(flats[0])
    factors = {}
    for name in (name for name, _, _ in layout.modules if rank):
        a, b = refactor([(v[name][0].astype(np.float64), v[name][1].astype(np.float64)) for v in views], share, rank)
        factors[name] = (a.astype(np.float32), b.astype(np.float32))
    low = layout.width * rank
    rest = sum((w * flat[low:].astype(np.float64) for w, flat in zip(share, flats, strict=True)), start=0.0)
    parts = [layout.join(factors)] if rank else []
    return np.concatenate([*parts, np.asarray(rest, dtype=np.float32).reshape(-1)])


def refactor(pairs: Sequence[Factors], weights: Matrix, rank: int) -> Factors:
    """(A [r, in], B [out, r]) with B A the best rank-r approximation of Σ w_k B_k A_k; both carry √σ.

    One pair alone comes back as it is, so that a subspace with one client is not turned for nothing.
    """
    if len(pairs) == 1:
        return pairs[0]
    tall = np.concatenate([w * b for w, (_, b) in zip(weights, pairs, strict=True)], axis=1)  # [out, N·r]
    wide = np.concatenate([a for a, _ in pairs], axis=0)  # [N·r, in]
    left, upper = np.linalg.qr(tall)
    right, lower = np.linalg.qr(wide.T)
    u, sigma, v = np.linalg.svd(upper @ lower.T, full_matrices=False)
    if not sigma.any():  # nothing has been learnt yet: the mean of A keeps its draw
        return np.tensordot(weights, np.stack([a for a, _ in pairs]), 1), np.zeros_like(pairs[0][1])
    root = np.sqrt(sigma[:rank])
    a, b = root[:, None] * (v[:rank] @ right.T), (left @ u[:, :rank]) * root
    heaviest = a[np.arange(len(a)), np.abs(a).argmax(axis=1)]
    sign = np.where(heaviest < 0, -1.0, 1.0)  # one of two equal answers
    return _padded(sign[:, None] * a, rank, 0), _padded(b * sign, rank, 1)


def _padded(factor: Matrix, rank: int, axis: int) -> Matrix:
    """Zeros up to rank r, where a layer is smaller than r."""
    lack = [(0, 0), (0, 0)]
    lack[axis] = (0, rank - factor.shape[axis])
    return np.pad(factor, lack)
