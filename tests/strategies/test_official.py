"""strategy.compat=official: each published defect beside what DISCO does, on tokens in the plane."""

from typing import Any

import numpy as np
import pytest

from fedstrata.core.adapters import fresh
from fedstrata.core.errors import BadInput
from fedstrata.core.identity import Token, pooled
from fedstrata.strategies import find
from fedstrata.strategies.base import Participant, Parts, Setup
from fedstrata.strategies.disco import Disco, DiscoConfig
from fedstrata.strategies.official import Official, misplaced
from fedstrata.strategies.published import SLOTS

START = [1.0, 1.0, 1.0]


def client(partition: int, degrees: float, count: int = 10) -> Participant:
    value = np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], dtype=np.float32)
    return Participant(partition + 2, partition, Token(value, count))


def both(setup: Setup) -> tuple[Disco, Disco]:
    """As published, and DISCO."""
    made = [
        find("disco").variant(options)(options, setup) for options in (DiscoConfig(compat="official"), DiscoConfig())
    ]
    official, plain = made
    assert isinstance(official, Official)
    assert isinstance(plain, Disco)
    assert type(plain) is Disco
    return official, plain


def stage(strategy: Disco, number: int, train_reply: Any, *who: tuple[Participant, list[float]]) -> None:
    strategy.begin_stage(number)
    strategy.meet([participant for participant, _ in who])
    strategy.aggregate_train(1, [train_reply(participant.partition, values) for participant, values in who])


def test_d11_the_token_update_is_no_mean() -> None:
    old, new = Token(np.array([2], np.float32), 4), [Token(np.array([10], np.float32), 1)] * 2
    assert misplaced(old, new).value == pytest.approx(11.33, abs=0.01)  # 2 · 4 + 20 / 6
    assert pooled([old, *new]).value == pytest.approx(4.67, abs=0.01)  # (2 · 4 + 20) / 6
    assert misplaced(old, new).count == pooled([old, *new]).count == 6


def test_d11_a_revisited_token_grows_at_every_visit(setup: Setup, train_reply: Any) -> None:
    official, plain = both(setup)
    for strategy in (official, plain):
        for number in range(1, 5):
            stage(strategy, number, train_reply, (client(0, 0), START))
    assert np.linalg.norm(plain.state.tokens()[0]) == pytest.approx(1)
    growth = np.linalg.norm(official.state.tokens()[0])
    assert growth > 10 * 20 * 30  # about N at each of three visits


def test_d8_behind_the_first_round_a_clients_place_decides(setup: Setup, train_reply: Any, sent: Any) -> None:
    official, plain = both(setup)
    for strategy in (official, plain):
        stage(strategy, 1, train_reply, (client(0, 0), START), (client(1, 90), [2, 2, 2]))
        strategy.meet([client(2, 90), client(3, 0)])
    assert {k: subspace for k, (subspace, _) in sent(official, 2).items()} == {2: 0, 3: 1}
    assert {k: subspace for k, (subspace, _) in sent(plain, 2).items()} == {2: 1, 3: 0}
    official.aggregate_train(2, [train_reply(2, [8, 8, 8]), train_reply(3, [9, 9, 9])])
    assert [adapter.tolist() for adapter in official.knowledge().adapters] == [[8, 8, 8], [9, 9, 9]]
    assert official.state.tokens()[0] == pytest.approx([1, 0], abs=1e-6)  # tokens go where they are like
    official.begin_stage(2)
    official.meet([client(2, 90), client(3, 0)])
    assert dict(official.placement()) == {2: 1, 3: 0}


def test_d9_what_no_cluster_owns_is_overwritten_by_the_last_client(setup: Setup, train_reply: Any, sent: Any) -> None:
    official, plain = both(setup)
    for strategy in (official, plain):
        stage(strategy, 1, train_reply, (client(0, 0), START), (client(1, 90), [2, 2, 2]))
        strategy.begin_stage(2)
        strategy.meet([client(2, 0), client(3, 0), client(4, 0)])
        sent(strategy)
    slots = official.payload()[SLOTS]
    assert slots[:2].tolist() == [START, [2, 2, 2]]
    assert slots[2].tolist() == fresh(setup.layout, 1, 0, 2).tolist()
    assert official.extras() == {SLOTS: (3, 3)}
    strays = {2: [[3, 3, 3], [4, 4, 4], [5, 5, 5]], 4: [[6, 6, 6], [7, 7, 7], [8, 8, 8]]}
    official.aggregate_train(1, [train_reply(p, [9, 9, 9], slots=strays[p]) for p in (4, 2)])  # 3 does not answer
    plain.aggregate_train(1, [train_reply(p, [9, 9, 9]) for p in (4, 2)])
    assert [a.tolist() for a in official.knowledge().adapters] == [[9, 9, 9], [7, 7, 7]]
    assert [a.tolist() for a in plain.knowledge().adapters] == [[9, 9, 9], [2, 2, 2]]
    official.meet([client(2, 0)])
    assert (dict(official.payload()), dict(official.extras()), dict(plain.payload())) == ({}, {}, {})


def test_d10_the_second_of_two_new_tasks_loses_its_first_training(setup: Setup, train_reply: Any, sent: Any) -> None:
    official, plain = both(setup)
    for strategy in (official, plain):
        stage(strategy, 1, train_reply, (client(0, 0), START))
        strategy.begin_stage(2)
        strategy.meet([client(1, 90), client(2, 180)])
    free = fresh(setup.layout, 1, 0, 1).tolist()
    assert [values for _, values in sent(official, 2).values()] == [free, free]
    assert [values for _, values in sent(plain, 2).values()] == [free, fresh(setup.layout, 1, 0, 2).tolist()]
    for strategy in (official, plain):
        strategy.aggregate_train(2, [train_reply(1, [5, 5, 5]), train_reply(2, [6, 6, 6])])
    assert [a.tolist() for a in official.knowledge().adapters] == [
        START,
        [5, 5, 5],
        fresh(setup.layout, 1, 0, 2).tolist(),
    ]
    assert [a.tolist() for a in plain.knowledge().adapters] == [START, [5, 5, 5], [6, 6, 6]]


def test_in_the_very_first_round_all_train_one_draw_and_none_is_lost(setup: Setup, train_reply: Any, sent: Any) -> None:
    official, _ = both(setup)
    official.begin_stage(1)
    official.meet([client(0, 0), client(1, 90)])
    first = fresh(setup.layout, 1, 0, 0).tolist()
    assert [values for _, values in sent(official).values()] == [first, first]
    official.aggregate_train(1, [train_reply(0, [5, 5, 5]), train_reply(1, [6, 6, 6])])
    assert [a.tolist() for a in official.knowledge().adapters] == [[5, 5, 5], [6, 6, 6]]


def test_a_resumed_stage_goes_on_by_the_same_places(setup: Setup, train_reply: Any) -> None:
    official, _ = both(setup)
    stage(official, 1, train_reply, (client(0, 0), START), (client(1, 90), [2, 2, 2]))
    parts = official.save()
    again, _ = both(setup)
    again.load(Parts(dict(parts.tensors), dict(parts.facts)))
    for strategy in (official, again):
        strategy.begin_stage(1)
        strategy.meet([client(2, 90), client(3, 0)])
        assert dict(strategy.placement()) == {2: 0, 3: 1}


def test_d7_a_client_with_one_batch_learns_nothing_and_counts(federate: Any) -> None:
    """Whole runs: batches larger than any client's data, so that every client takes one step."""
    one = ["train.batch_size=256", "train.warmup_steps=0"]
    official, plain = federate("disco", "strategy.compat=official", *one), federate("disco", *one)
    for index in range(2):
        name, factors = f"subspace.{index}.adapter", []
        for ran in (official, plain):
            factors.append(np.count_nonzero(ran.parts.tensors[name]))
        assert factors[0] < factors[1]  # B is still 0
        assert official.parts.facts["counts"][index] > 0
    for what in ("bytes_up", "bytes_down"):  # with all subspaces in the second stage's first round
        assert official.summary["plan"][what]["planned"] == official.summary[what] > plain.summary[what]


def test_it_does_not_average_alone() -> None:
    assert DiscoConfig().averages
    assert not DiscoConfig(compat="official").averages


def test_only_disco_itself_has_a_published_code() -> None:
    with pytest.raises(
        BadInput, match=r"strategy\.compat: must be none with strategy\.name=random-route, got 'official'"
    ):
        DiscoConfig(name="random-route", compat="official")
    with pytest.raises(BadInput, match=r"strategy\.compat: must be none \| official, got 'yes'"):
        DiscoConfig(compat="yes")
