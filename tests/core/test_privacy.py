"""Clipping, noise and epsilon: known answers, exact sensitivities, and noise that can be drawn again."""

import math

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from fedstrata.core import privacy
from fedstrata.core.config import StrategyConfig, build
from fedstrata.core.errors import BadInput
from fedstrata.core.privacy import TokenConfig, clipped, epsilon, gaussian, mean_sensitivity, own_least
from fedstrata.strategies.disco import DiscoConfig
from fedstrata.strategies.finetune import FinetuneConfig

DELTA = 1e-5


@pytest.mark.parametrize(("z", "expected"), [(0.5, 10.0), (1.0, 4.38), (2.0, 1.99)])
def test_one_release_costs_what_the_literature_says(z: float, expected: float) -> None:
    assert epsilon(z, 1, DELTA) == pytest.approx(expected, rel=0.02)


def test_thirty_rounds_with_everybody_cost_37_6() -> None:
    assert epsilon(1.0, 30, DELTA) == pytest.approx(37.6, rel=0.02)


@pytest.mark.parametrize(("z", "releases"), [(1.0, 1), (1.0, 8), (2.0, 30), (0.7, 5)])
def test_composition_agrees_with_another_accountant(z: float, releases: int) -> None:
    accountant = PLDAccountant().compose(SelfComposedDpEvent(GaussianDpEvent(z), releases))
    assert epsilon(z, releases, DELTA) == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.3, 5), st.integers(1, 50), st.floats(1e-9, 0.1))
def test_epsilon_is_the_smallest_that_keeps_delta(z: float, releases: int, delta: float) -> None:
    """Balle and Wang's δ(ε) = Φ(1/2σ − εσ) − e^ε Φ(−1/2σ − εσ), written out."""

    def spent(eps: float) -> float:
        sigma = z / math.sqrt(releases)
        below, above = (math.erfc((eps * sigma - sign / (2 * sigma)) / math.sqrt(2)) / 2 for sign in (1, -1))
        return below - math.exp(eps) * above

    found = epsilon(z, releases, delta)
    assert spent(found) == pytest.approx(delta, rel=1e-3, abs=1e-14)
    assert epsilon(z, releases + 1, delta) > found


@pytest.mark.parametrize("releases", [1, 10_000])
def test_hardly_any_noise_has_a_huge_epsilon_and_no_end_of_search(releases: int) -> None:
    found = epsilon(1e-3, releases, DELTA)
    assert releases * 5e5 < found < releases * 5.1e5  # near 1 / 2σ², where the mean of the privacy loss is


def test_nothing_released_costs_nothing_and_no_noise_has_no_epsilon() -> None:
    assert epsilon(1.0, 0, DELTA) == 0.0
    for z, releases, delta in [(0.0, 1, DELTA), (1.0, -1, DELTA), (1.0, 1, 0.0), (1.0, 1, 1.0)]:
        with pytest.raises(ValueError, match="expected z > 0"):
            epsilon(z, releases, delta)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.floats(0.01, 100), st.integers(0, 2**31))
def test_no_row_is_longer_than_the_bound_and_short_ones_keep_their_bits(n: int, bound: float, seed: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(n, 5)) * np.logspace(-6, 6, n)[:, None]
    rows[0] = 0
    cut = clipped(rows, bound)
    short = np.linalg.norm(rows, axis=1) <= bound
    assert (np.linalg.norm(cut, axis=1) <= bound * (1 + 1e-12)).all()
    assert (cut[short] == rows[short]).all()
    directions = (cut * rows).sum(1) / np.maximum(np.linalg.norm(cut, axis=1) * np.linalg.norm(rows, axis=1), 1e-300)
    assert directions[1:] == pytest.approx(1)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.floats(0.1, 10), st.integers(0, 2**31))
def test_one_row_replaced_moves_a_mean_by_the_sensitivity_at_most(n: int, bound: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, other = rng.normal(size=(n, 4)) * 20, rng.normal(size=4) * 20
    moved = clipped(rows, bound).mean(0) - clipped(np.vstack([other, rows[1:]]), bound).mean(0)
    assert np.linalg.norm(moved) <= mean_sensitivity(bound, n) * (1 + 1e-9)


def test_opposite_rows_reach_the_sensitivity() -> None:
    rows = np.zeros((10, 3))
    rows[0, 0] = 7.0
    there, back = clipped(rows, 1.5).mean(0), clipped(-rows, 1.5).mean(0)
    assert np.linalg.norm(there - back) == pytest.approx(mean_sensitivity(1.5, 10)) == 0.3


def test_noise_is_standard_normal() -> None:
    drawn = gaussian(b"key", ["a"], 200_001)
    assert drawn.shape == (200_001,)
    assert np.isfinite(drawn).all()
    # five standard errors of mean, variance, skewness and kurtosis
    n = drawn.size
    assert abs(drawn.mean()) < 5 / math.sqrt(n)
    assert abs(drawn.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((drawn**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((drawn**4).mean() - 3) < 5 * math.sqrt(96 / n)
    halves = drawn[:100_000], drawn[100_001:]  # Box and Muller's two halves share their radii
    assert abs(np.corrcoef(*halves)[0, 1]) < 5 / math.sqrt(100_000)


def test_noise_is_a_function_of_key_and_names() -> None:
    first = gaussian(b"key", ["token", 1, 0.5], 64)
    assert (gaussian(b"key", ["token", 1, 0.5], 64) == first).all()
    for key, names in [(b"kex", ["token", 1, 0.5]), (b"key", ["token", 2, 0.5]), (b"key", ["token", "1", 0.5])]:
        assert abs(np.corrcoef(gaussian(key, names, 64), first)[0, 1]) < 0.6
    assert gaussian(b"key", ["x"], 1).shape == (1,)


def test_all_methods_that_ask_for_tokens_have_the_options_and_others_refuse_them() -> None:
    config = build([{"strategy": {"token_noise": 1, "token_clip": 2.5, "token_min_samples": 50}}], DiscoConfig)
    options = privacy.token_options(config.strategy)
    assert (options.token_noise, options.token_clip, options.token_min_samples, options.token_delta) == (
        1,
        2.5,
        50,
        DELTA,
    )
    assert privacy.token_options(StrategyConfig()) == TokenConfig()
    with pytest.raises(BadInput, match="strategy.token_noise"):
        build([{"strategy": {"token_noise": 1}}], FinetuneConfig)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("strategy", "token_min_samples", 0),
        ("strategy", "token_noise", -1),
        ("strategy", "token_noise", 1e-4),
        ("strategy", "token_noise", float("inf")),
        ("strategy", "token_clip", 0),
        ("strategy", "token_delta", 1),
        ("federation", "update_clip", -0.5),
        ("federation", "update_clip", float("nan")),
        ("federation", "update_noise", 1),  # without a bound there is nothing to scale it by
        ("federation", "update_delta", 0),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(section: str, key: str, value: float) -> None:
    with pytest.raises(BadInput, match=f"{section}.{key}"):
        build([{section: {key: value}}], DiscoConfig)


def test_two_rules_of_clipping_are_one_too_many() -> None:
    with pytest.raises(BadInput, match=r"federation.update_clip: must be 0 with federation.clip=median"):
        build([{"federation": {"clip": "median", "update_clip": 1.0}}])


def test_a_clients_own_limit_may_only_raise_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    options = DiscoConfig(token_min_samples=50)
    monkeypatch.delenv(privacy.LEAST, raising=False)
    assert own_least(options) == 50
    for own, least in [("20", 50), ("70", 70), ("0", 50)]:
        monkeypatch.setenv(privacy.LEAST, own)
        assert own_least(options) == least
    for bad in ("many", "-3", "1.5", ""):
        monkeypatch.setenv(privacy.LEAST, bad)
        with pytest.raises(BadInput, match=f"{privacy.LEAST}: must be a whole number"):
            own_least(options)
