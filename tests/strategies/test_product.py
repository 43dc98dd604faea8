"""Averaging products: gauges do not matter, known answers, the same as the mean where there is one gauge."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedstrata.core.adapters import Flat, Layout, fresh
from fedstrata.core.errors import BadInput
from fedstrata.core.identity import Token
from fedstrata.strategies import find
from fedstrata.strategies.base import Participant, Setup, Strategy
from fedstrata.strategies.disco import DiscoConfig
from fedstrata.strategies.finetune import FinetuneConfig
from fedstrata.strategies.merging import MergeConfig
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


def test_what_lies_behind_the_factors_is_averaged_as_it_is() -> None:
    dora, ia3 = replace(LAYOUT, kind="dora"), replace(LAYOUT, kind="ia3")
    flats = adapters(2, layout=dora)
    merged = product_mean(flats, [1.0, 3.0], dora)
    assert merged.size == flats[0].size
    assert merged[-21:] == pytest.approx(0.25 * flats[0][-21:] + 0.75 * flats[1][-21:], abs=1e-6)
    rows = [np.arange(ia3.size(0), dtype=np.float32), np.ones(ia3.size(0), dtype=np.float32)]
    assert product_mean(rows, [1.0, 1.0], ia3) == pytest.approx((rows[0] + rows[1]) / 2)


def made(name: str, setup: Setup, **options: Any) -> Strategy:
    kind = find(name)
    one = {"subspaces": 1} if name == "finetune" else {}
    return kind(kind.config_type(**one, **options), replace(setup, layout=LAYOUT, rank=RANK))


def round_of(strategy: Strategy, flats: Sequence[Flat], train_reply: Any, degrees: Sequence[float] = ()) -> None:
    """Client k's token points to `degrees[k]`, and its adapter is `flats[k]` with 10 examples."""
    turns = np.radians(degrees or [0.0] * len(flats))
    tokens = [Token(np.array([np.cos(turn), np.sin(turn)], dtype=np.float32), 10) for turn in turns]
    strategy.meet([Participant(k + 2, k, token) for k, token in enumerate(tokens)])
    strategy.aggregate_train(1, [train_reply(k, flat) for k, flat in enumerate(flats)])


@pytest.mark.parametrize("name", ["finetune", "disco"])
def test_a_client_in_another_gauge_ruins_the_mean_of_factors_and_not_that_of_products(
    setup: Setup, train_reply: Any, name: str
) -> None:
    start = fresh(LAYOUT, RANK, 0, 0)
    honest = [start + flat for flat in adapters(4, spread=0.02)]
    hostile = [turned(honest[0], 1), *honest[1:]]
    error = {}
    for merge in ("mean", "product"):
        plain, attacked = made(name, setup, merge=merge), made(name, setup, merge=merge)
        round_of(plain, honest, train_reply)
        round_of(attacked, hostile, train_reply)
        one, other = (product(strategy.knowledge().adapters[0]) for strategy in (plain, attacked))
        error[merge] = np.linalg.norm(other - one) / np.linalg.norm(one)
    assert error["product"] < 1e-5
    assert error["mean"] > 0.1


def test_every_subspace_has_a_product_of_its_own(setup: Setup, train_reply: Any) -> None:
    strategy, flats = made("disco", setup, merge="product"), adapters(5)
    round_of(strategy, flats, train_reply, [0, 90, 0, 90, 0])
    one, other = strategy.knowledge().adapters
    assert one.tobytes() == product_mean([flats[0], flats[2], flats[4]], [10.0] * 3, LAYOUT).tobytes()
    assert other.tobytes() == product_mean([flats[1], flats[3]], [10.0] * 2, LAYOUT).tobytes()


def test_a_shared_projector_is_averaged_beside_products(setup: Setup, train_reply: Any) -> None:
    setup, kind = replace(setup, layout=TAILED, rank=RANK), find("disco")
    strategy = kind(DiscoConfig(merge="product", projector="shared"), setup)
    flats = adapters(2, layout=TAILED)
    round_of(strategy, flats, train_reply, [0, 90])
    assert strategy.knowledge().shared == pytest.approx((flats[0][-6:] + flats[1][-6:]) / 2, abs=1e-6)


def test_a_product_is_no_average_for_the_noise_and_takes_no_optimiser() -> None:
    assert not FinetuneConfig(merge="product").averages
    with pytest.raises(BadInput, match=r"strategy.server_optimizer: must be none with strategy.merge=product, got"):
        MergeConfig(merge="product", server_optimizer="fedadam")


@pytest.mark.parametrize("name", ["ewc", "scaffold", "moelora"])
def test_methods_that_remember_the_factors_refuse_products(name: str) -> None:
    with pytest.raises(BadInput, match=r"strategy\.merge: must be mean \| .* \| geomedian, got 'product'"):
        find(name).config_type(merge="product")
