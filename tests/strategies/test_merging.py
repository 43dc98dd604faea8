"""Rules and server optimisers on a growing set of subspaces, under every method that averages."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedstrata.core.adapters import Layout, fresh
from fedstrata.core.errors import BadInput
from fedstrata.core.identity import Token
from fedstrata.core.streaming import RunningMean
from fedstrata.strategies import find
from fedstrata.strategies.base import Participant, Parts, Setup, Strategy
from fedstrata.strategies.disco import Disco, DiscoConfig
from fedstrata.strategies.finetune import Finetune, FinetuneConfig
from fedstrata.strategies.flower import StockConfig
from fedstrata.strategies.merging import MergeConfig, Merging
from fedstrata.strategies.optimizers import OPTIMIZERS
from fedstrata.strategies.rules import RULES

AVERAGING = ["finetune", "joint", "fedprox", "scaffold", "ewc", "lwf", "olora", "disco", "oracle", "random-route"]
START = np.array([1, 1, 1], dtype=np.float32)


def client(partition: int, degrees: float, task: int = 0) -> Participant:
    value = np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], dtype=np.float32)
    return Participant(partition + 2, partition, Token(value, 10), (task,))


def made(name: str, setup: Setup, **options: Any) -> Strategy:
    kind = find(name)
    one = {"subspaces": 1} if issubclass(kind, Finetune) and name != "olora" else {}
    return kind(kind.config_type(**one, **options), setup)


def merged(options: MergeConfig, *flats: list[float]) -> list[float]:
    merging = Merging(options, lambda: START)
    for number, flat in enumerate(flats, 1):
        merging.add(np.array(flat, dtype=np.float32), number)
    adapter: list[float] = merging.result()[0].tolist()
    return adapter


def test_a_rule_merges_the_differences_to_what_was_sent() -> None:
    rows = [[1.0, 2, 3], [3, 2, 1], [1000, -1000, 2]]
    assert merged(MergeConfig(merge="median"), *rows) == [3, 2, 2]
    assert merged(MergeConfig(merge="trimmed"), *rows) == [3, 2, 2]
    assert merged(MergeConfig(merge="trimmed", suspects=0), *rows) == pytest.approx([1004 / 3, -332, 2])
    assert merged(MergeConfig(merge="multikrum"), *rows, [1, 2, 3], [1, 2, 3]) == pytest.approx(
        [(1 + 2 * 3 + 4 + 5) / 12, 2, (3 + 2 + 12 + 15) / 12]
    )


def test_the_mean_stays_the_one_that_holds_no_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    flats = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    plain, merging = RunningMean(), Merging(MergeConfig(), lambda: pytest.fail("a mean needs no start"))
    for number, flat in enumerate(flats, 1):
        plain.add(flat, number)
        merging.add(flat, number)
    adapter, moments = merging.result()
    assert adapter.tobytes() == plain.value().tobytes()
    assert moments is None


@pytest.mark.parametrize("merge", RULES)
def test_a_merge_of_nothing_of_no_weight_or_of_another_length_is_refused(merge: str) -> None:
    merging = Merging(MergeConfig(merge=merge), lambda: START)
    with pytest.raises(ValueError, match="no adapters"):
        merging.result()
    with pytest.raises(ValueError, match="above 0, got 0"):
        merging.add(START, 0)
    merging.add(START, 1)
    with pytest.raises(ValueError, match="one length"):
        merging.add(START[:2], 1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_goes_on_from_what_a_rule_makes(setup: Setup, train_reply: Any, optimizer: str) -> None:
    strategy = made("finetune", setup, merge="median", server_optimizer=optimizer)
    assert isinstance(strategy, Finetune)
    old = strategy.state.adapter
    strategy.meet([client(k, 0) for k in range(3)])
    strategy.aggregate_train(1, [train_reply(k, old + shift) for k, shift in enumerate([0.1, 0.1, 1e6])])
    honest = made("finetune", setup, server_optimizer=optimizer)
    honest.meet([client(0, 0)])
    honest.aggregate_train(1, [train_reply(0, old + 0.1)])
    assert isinstance(honest, Finetune)
    assert strategy.state.adapter == pytest.approx(honest.state.adapter, abs=1e-5)
    assert strategy.state.adapter.dtype == np.float32


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("merge", RULES)
@pytest.mark.parametrize("name", AVERAGING)
def test_every_method_that_averages_goes_on_after_save_and_load_as_it_would_have(
    setup: Setup, train_reply: Any, name: str, merge: str, optimizer: str
) -> None:
    options = {"merge": merge, "server_optimizer": optimizer}
    one, two = made(name, setup, **options), made(name, setup, **options)
    extra = {"control": [0.1, 0, 0]} if name == "scaffold" else {}

    def train(strategy: Strategy, number: int) -> None:
        strategy.meet([client(k, 90 * (k % 2), k % 2) for k in range(4)])
        draw = np.random.default_rng(number)
        strategy.aggregate_train(number, [train_reply(k, draw.normal(size=3), **extra) for k in range(4)])

    train(one, 1)
    parts = one.save()
    two.load(Parts(dict(parts.tensors), dict(parts.facts)))
    train(one, 2)
    train(two, 2)
    assert {n: t.tobytes() for n, t in one.save().tensors.items()} == {
        n: t.tobytes() for n, t in two.save().tensors.items()
    }
    steps = [tensor.item() for key, tensor in one.save().tensors.items() if key.endswith("steps")]
    assert steps == [2] * len(one.knowledge().adapters)


def test_a_subspace_that_opens_later_begins_as_one_that_was_there_first(setup: Setup, train_reply: Any) -> None:
    """FedAdam's bias is corrected by the subspace's own rounds; Flower's own class refuses what is new."""
    late = Disco(DiscoConfig(server_optimizer="fedadam"), setup)
    for number in range(1, 4):
        late.meet([client(0, 0)])
        late.aggregate_train(number, [train_reply(0, np.full(3, number))])
    before = late.state.subspaces[0]
    late.meet([client(1, 90)])
    start = fresh(setup.layout, 1, 0, 1)
    late.aggregate_train(4, [train_reply(1, start + 0.5)])
    first, second = late.state.subspaces
    assert first.adapter is before.adapter  # the other subspace and its moments keep their bits
    assert first.moments is before.moments
    alone = Merging(late.options, lambda: start)
    alone.add(start + np.float32(0.5), 1)
    expected, moments = alone.result()
    assert second.adapter.tobytes() == expected.tobytes()
    assert moments is not None
    assert second.moments is not None
    assert (second.moments.steps, second.moments.first.tobytes()) == (1, moments.first.tobytes())


@pytest.mark.parametrize("merge", [name for name in RULES if name != "mean"])
def test_a_hostile_client_moves_its_subspace_little_and_no_other(setup: Setup, train_reply: Any, merge: str) -> None:
    strategy = Disco(DiscoConfig(merge=merge, suspects=1), setup)
    strategy.meet([client(k, 90 * (k >= 5)) for k in range(7)])
    start = fresh(setup.layout, 1, 0, 0)
    rows = [train_reply(k, start + 0.01 * k) for k in range(4)]
    rows += [train_reply(4, start - 1e6), *(train_reply(k, np.full(3, k)) for k in (5, 6))]
    strategy.aggregate_train(1, rows)
    one, other = strategy.knowledge().adapters
    assert np.abs(one - start).max() < 0.05
    assert np.abs(other - 5.5).max() <= 0.5


def test_the_tail_has_a_merge_and_moments_of_its_own(setup: Setup, train_reply: Any) -> None:
    layout = Layout((("layer", 1, 2),), (("projector.weight", (2, 1)),))
    options = DiscoConfig(projector="shared", merge="median", server_optimizer="fedavgm", server_momentum=0.5)
    strategy = Disco(options, replace(setup, layout=layout))
    start = fresh(layout.lora, 1, 0, 0)
    for number in (1, 2):
        strategy.meet([client(k, 90 * k) for k in range(3)])  # three subspaces
        tails = [strategy.state.shared + shift for shift in (1, 2, 1000)]
        strategy.aggregate_train(number, [train_reply(k, [*start, *tail]) for k, tail in enumerate(tails)])
    assert strategy.state.shared.tolist() == [5, 5]  # 2, then 0.5 · 2 + 2
    again = Disco(options, replace(setup, layout=layout))
    again.load(strategy.save())
    assert again.state.shared_moments is not None
    assert again.state.shared_moments.first.tolist() == [3, 3]


def test_without_an_optimizer_nothing_more_is_saved(setup: Setup, train_reply: Any) -> None:
    for name, expected in (("finetune", ["adapter"]), ("disco", ["subspace.0.adapter", "subspace.0.token"])):
        strategy = made(name, setup)
        strategy.meet([client(0, 0)])
        strategy.aggregate_train(1, [train_reply(0, [1, 2, 3])])
        assert sorted(strategy.save().tensors) == expected


def test_only_a_mean_without_an_optimizer_is_called_an_average() -> None:
    assert FinetuneConfig().averages
    assert DiscoConfig().averages
    assert not DiscoConfig(merge="median").averages
    assert not FinetuneConfig(server_optimizer="fedavgm").averages


def test_a_flower_strategy_refuses_ours() -> None:
    with pytest.raises(BadInput, match=r"strategy\.merge: must be mean: a Flower strategy merges by itself, got"):
        StockConfig(merge="median")
    with pytest.raises(BadInput, match=r"strategy\.server_optimizer: must be none: a Flower strategy has its own"):
        StockConfig(server_optimizer="fedadam")


@pytest.mark.parametrize("name", ["fedavgm", "fedadagrad", "fedadam", "fedyogi"])
def test_a_named_optimizer_is_finetune_with_it(setup: Setup, train_reply: Any, name: str) -> None:
    _same(setup, train_reply, name, server_optimizer=name)


@pytest.mark.parametrize(
    ("name", "merge"),
    [("fedmedian", "median"), ("fedtrimmed", "trimmed"), ("multikrum", "multikrum"), ("geomedian", "geomedian")],
)
def test_a_named_rule_is_finetune_with_it(setup: Setup, train_reply: Any, name: str, merge: str) -> None:
    _same(setup, train_reply, name, merge=merge)


@pytest.mark.parametrize(
    ("name", "key", "other"),
    [
        *((name, "server_optimizer", "none") for name in OPTIMIZERS),
        *((name, "merge", "mean") for name in ("fedmedian", "fedtrimmed", "multikrum", "geomedian")),
        ("fedadam", "server_optimizer", "fedyogi"),
        ("fedtrimmed", "merge", "median"),
    ],
)
def test_a_method_that_is_named_for_its_option_refuses_another_value(name: str, key: str, other: str) -> None:
    """It would be FedAvg, or another method of the catalogue, under this one's name."""
    kind = find(name).config_type
    own = getattr(kind(), key)
    with pytest.raises(BadInput, match=f"strategy.{key}: must be {own} with strategy.name={name}, got '{other}'"):
        kind(**{key: other})


def test_what_a_method_is_not_named_for_stays_free() -> None:
    assert find("fedadam").config_type(merge="median").merge == "median"  # type: ignore[call-arg]
    assert find("fedmedian").config_type(server_optimizer="fedavgm").server_optimizer == "fedavgm"  # type: ignore[call-arg]


def _same(setup: Setup, train_reply: Any, name: str, **options: Any) -> None:
    named, plain, other = made(name, setup), made("finetune", setup, **options), made("finetune", setup)
    for strategy in (named, plain, other):
        strategy.meet([client(k, 0) for k in range(5)])
        draw = np.random.default_rng(0)
        strategy.aggregate_train(1, [train_reply(k, draw.normal(size=3), k + 1) for k in range(5)])
    found, expected, mean = (strategy.knowledge().adapters[0].tobytes() for strategy in (named, plain, other))
    assert found == expected != mean


def test_flowers_own_median_is_ours(setup: Setup, train_reply: Any) -> None:
    """Flower's spelling beside ours: `flwr.serverapp.strategy:FedMedian`."""
    ours, theirs = made("fedmedian", setup), made("flwr.serverapp.strategy:FedMedian", setup)
    for strategy in (ours, theirs):
        strategy.meet([client(k, 0) for k in range(3)])
        strategy.aggregate_train(1, [train_reply(k, [k**2, 2 - k, 0.5], k + 1) for k in range(3)])
    for strategy in (ours, theirs):
        assert strategy.knowledge().adapters[0] == pytest.approx([1, 1, 0.5])
