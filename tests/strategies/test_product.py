"""Averaging products: gauges do not matter, known answers, the same as the mean where there is one gauge."""

import numpy as np
import pytest

from fedstrata.core.adapters import Flat, Layout
from fedstrata.strategies.product import product_mean, refactor

LAYOUT = Layout((("a.q_proj", 12, 10), ("b.q_proj", 9, 14)))
TAILED = Layout(LAYOUT.modules, (("p.weight", (3, 2)),))
RANK = 3


def adapters(number: int, spread: float = 0.3, seed: int = 0, layout: Layout = LAYOUT) -> list[Flat]:
    draw = np.random.default_rng(seed)
    centre = draw.normal(size=layout.size(RANK))
    return [(centre + spread * draw.normal(size=centre.size)).astype(np.float32) for _ in range(number)]


def product(flat: Flat, layout: Layout = LAYOUT) -> np.ndarray:
    return np.concatenate([(b.astype(float) @ a).ravel() for a, b in layout.split(flat).values()])


def turned(flat: Flat, seed: int) -> Flat:
    """The same adapter in another gauge: (Q A, B Qᵀ)."""
    draw = np.random.default_rng(seed)
    factors = {}
    for name, (a, b) in LAYOUT.split(flat).items():
        q, _ = np.linalg.qr(draw.normal(size=(RANK, RANK)))
        factors[name] = ((q @ a).astype(np.float32), (b @ q.T).astype(np.float32))
    return LAYOUT.join(factors)


def test_the_gauge_of_a_client_does_not_matter() -> None:
    flats = adapters(5)
    plain = product(product_mean(flats, [1.0] * 5, LAYOUT))
    poisoned = product(product_mean([turned(flats[0], 1), turned(flats[1], 2), *flats[2:]], [1.0] * 5, LAYOUT))
    scale = np.linalg.norm(plain)
    assert np.linalg.norm(poisoned - plain) / scale < 1e-5
    factors = np.mean([turned(flats[0], 1), turned(flats[1], 2), *flats[2:]], axis=0).astype(np.float32)
    assert np.linalg.norm(product(factors) - product(np.mean(flats, axis=0).astype(np.float32))) / scale > 0.1


def test_it_is_the_best_approximation_of_its_rank() -> None:
    flats, weights = adapters(4), [1.0, 2.0, 3.0, 4.0]
    a, b = LAYOUT.split(product_mean(flats, weights, LAYOUT))["a.q_proj"]
    views = [LAYOUT.split(flat)["a.q_proj"] for flat in flats]
    whole = sum(w * vb.astype(float) @ va for w, (va, vb) in zip(weights, views, strict=True)) / 10
    u, s, v = np.linalg.svd(whole)
    best = (u[:, :RANK] * s[:RANK]) @ v[:RANK]
    assert b.astype(float) @ a == pytest.approx(best, abs=1e-5)


def test_one_adapter_is_itself() -> None:
    (flat,) = adapters(1)
    assert np.array_equal(product_mean([flat], [3.0], LAYOUT), flat)


def test_before_anything_is_learnt_a_keeps_its_draw() -> None:
    flats = adapters(3)
    for flat in flats:
        for _, b in LAYOUT.split(flat).values():
            b[:] = 0
    merged = product_mean(flats, [1.0] * 3, LAYOUT)
    assert merged == pytest.approx(np.mean(flats, axis=0), abs=1e-6)


def test_the_order_of_clients_does_not_matter() -> None:
    flats, weights = adapters(4), [1.0, 2.0, 3.0, 4.0]
    other = product_mean(flats[::-1], weights[::-1], LAYOUT)
    assert other == pytest.approx(product_mean(flats, weights, LAYOUT), abs=1e-5)


def test_a_tail_is_averaged_as_it_is() -> None:
    flats = adapters(2, layout=TAILED)
    merged = product_mean(flats, [1.0, 3.0], TAILED)
    assert merged[-6:] == pytest.approx(0.25 * flats[0][-6:] + 0.75 * flats[1][-6:], abs=1e-6)
    assert merged.size == flats[0].size


def test_a_layer_smaller_than_the_rank_is_padded() -> None:
    draw = np.random.default_rng(0)
    pairs = [(draw.normal(size=(4, 2)), draw.normal(size=(3, 4))) for _ in range(3)]
    a, b = refactor(pairs, np.full(3, 1 / 3), 4)
    assert (a.shape, b.shape) == ((4, 2), (3, 4))
    assert b @ a == pytest.approx(sum(vb @ va for va, vb in pairs) / 3)


def test_weights_must_fit() -> None:
    with pytest.raises(ValueError, match="one weight per adapter"):
        product_mean(adapters(2), [0.0, 0.0], LAYOUT)
