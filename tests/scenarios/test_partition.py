"""Every row at exactly one client, by the law, from the seed."""

import hashlib
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from fedstrata.core.errors import BadInput
from fedstrata.core.seeds import generator
from fedstrata.scenarios.dealing import (
    Indices,
    Shares,
    by_source,
    check_sizes,
    dirichlet_label,
    dirichlet_quantity,
    group,
    iid,
    largest_remainder,
)
from fedstrata.scenarios.partition import PARTITIONS, Deck, PartitionRule, describe

RULES = [
    PartitionRule("dirichlet"),
    PartitionRule("dirichlet-label"),
    PartitionRule("dirichlet-label", label="task"),
    PartitionRule("dirichlet-label", label="source", field="city"),
    PartitionRule("iid"),
    PartitionRule("by-task", min_size=0),
    PartitionRule("by-source", min_size=0, field="city"),
]
rows, clients, seeds = st.integers(60, 400), st.integers(1, 12), st.integers(0, 2**31)
answers = st.lists(st.integers(0, 9), min_size=60, max_size=200)


def deck(labels: list[int], count: int, seed: int = 0, **told: Any) -> Deck:
    return Deck(np.array(labels, dtype=np.uint64), count, seed, **told)


def deal(rule: PartitionRule, labels: list[int], count: int, seed: int = 0, **told: Any) -> list[list[int]]:
    return plain(PARTITIONS[rule.kind](deck(labels, count, seed, **told), rule))


def plain(shares: Shares) -> list[list[int]]:
    assert all(share.dtype == np.int64 and share.ndim == 1 for share in shares)
    return [share.tolist() for share in shares]


def holds_each_row_once(shares: list[list[int]], n: int) -> bool:
    return sorted(row for share in shares for row in share) == list(range(n))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.kind}-{rule.label}")
@settings(max_examples=30, deadline=None)
@given(answers, clients, st.floats(0.5, 50), seeds, st.integers(0, 3), st.data())
def test_every_kind_gives_every_row_to_one_client_honours_min_size_and_is_pure(
    rule: PartitionRule, labels: list[int], count: int, beta: float, seed: int, least: int, data: st.DataObject
) -> None:
    tasks = data.draw(st.integers(1, count))
    told = {"tasks": tasks, "task": data.draw(st.integers(0, tasks - 1))}
    asked = PartitionRule(rule.kind, beta, max(least, rule.min_size), rule.label, rule.field)
    try:
        shares = deal(asked, labels, count, seed, **told)
    except BadInput:  # many clients, few rows, a small beta: practically never, and the law says so
        reject()
    assert len(shares) == count
    assert holds_each_row_once(shares, len(labels))
    assert all(share == sorted(share) for share in shares)
    holders = shares[told["task"] :: tasks] if rule.kind == "by-task" else shares
    assert min(map(len, holders)) >= asked.min_size
    assert shares == deal(asked, labels, count, seed, **told)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.kind}-{rule.label}")
def test_another_seed_deals_otherwise(rule: PartitionRule) -> None:
    labels = [row % 7 for row in range(140)]
    assert len({str(deal(rule, labels, 4, seed)) for seed in range(5)}) == 5


def test_a_partition_is_the_same_in_every_process() -> None:
    code = (
        "import numpy as np; from fedstrata.scenarios.partition import PARTITIONS, Deck, PartitionRule as Rule;"
        "rules = [Rule('dirichlet'), Rule('dirichlet-label'), Rule('iid'), Rule('by-source', field='city')];"
        "deck = Deck(np.arange(90, dtype=np.uint64) % 7, 5, 3);"
        "print([[hand.tolist() for hand in PARTITIONS[rule.kind](deck, rule)] for rule in rules])"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("0", "4242")
    }
    rules = [RULES[0], RULES[1], RULES[4], PartitionRule("by-source", field="city")]
    assert told == {f"{[deal(rule, [row % 7 for row in range(90)], 5, 3) for rule in rules]}\n"}


@settings(max_examples=40, deadline=None)
@given(rows, clients, seeds)
def test_iid_gives_equal_parts(n: int, count: int, seed: int) -> None:
    sizes = [len(share) for share in iid(n, count, seed)]
    assert max(sizes) - min(sizes) <= 1


DEALT: list[tuple[tuple[Any, ...], list[list[int]]]] = [
    ((12, 3, 1.0, 0), [[0, 4, 7, 11], [2, 6, 8, 9, 10], [1, 3, 5]]),
    ((20, 4, 0.5, 7, 2), [[1, 2, 3, 4, 8, 9, 10, 12, 13, 14, 17, 18], [11, 16], [6, 15], [0, 5, 7, 19]]),
    ((10, 2, 5.0, 2**31), [[0, 2, 4, 5, 6, 7], [1, 3, 8, 9]]),
    ((11, 3, 0), [[5, 6, 7, 9], [0, 2, 3, 4], [1, 8, 10]]),
    ((9, 4, 5), [[0, 5, 8], [1, 3], [2, 4], [6, 7]]),
]
DEALT_AT_LENGTH: list[tuple[tuple[Any, ...], str]] = [
    ((1200, 20, 1.0, 123456789, 3), "4ab609abb83d"),
    ((5000, 50, 5.0, 2**31, 1), "d01b0b52cd83"),
    ((1200, 20, 99), "acf584a00947"),
    ((5001, 50, 2**62), "064c5f7615a0"),
]


@pytest.mark.parametrize(("asked", "shares"), DEALT)
def test_dirichlet_and_iid_deal_what_they_always_did(asked: tuple[Any, ...], shares: list[list[int]]) -> None:
    law = iid if len(asked) == 3 else dirichlet_quantity
    assert plain(law(*asked)) == shares


@pytest.mark.parametrize(("asked", "sha"), DEALT_AT_LENGTH)
def test_dirichlet_and_iid_deal_many_rows_as_they_always_did(asked: tuple[Any, ...], sha: str) -> None:
    law = iid if len(asked) == 3 else dirichlet_quantity
    assert hashlib.sha256(repr(plain(law(*asked))).encode()).hexdigest()[:12] == sha


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=30), st.integers(0, 10_000))
def test_largest_remainder_adds_up_and_stays_within_one(weights: list[float], n: int) -> None:
    proportions = np.array(weights) / sum(weights)
    sizes = largest_remainder(proportions, n)
    assert sizes.sum() == n
    assert np.abs(sizes - proportions * n).max() < 1 + 1e-6


def test_largest_remainder_by_hand() -> None:
    assert largest_remainder(np.array([0.5, 0.25, 0.25]), 5).tolist() == [3, 1, 1]
    assert largest_remainder(np.array([0.45, 0.35, 0.2]), 10).tolist() == [5, 3, 2]


@pytest.mark.parametrize("beta", [0.5, 5.0])
def test_marginals_approach_the_dirichlet_law_as_n_grows(beta: float) -> None:
    count, n, draws = 5, 20_000, 300
    parts = np.array([[len(share) / n for share in dirichlet_quantity(n, count, beta, seed)] for seed in range(draws)])
    variance = (count - 1) / (count**2 * (count * beta + 1))
    assert parts.mean(axis=0) == pytest.approx(1 / count, abs=4 * (variance / draws) ** 0.5)
    assert parts.var() == pytest.approx(variance, rel=0.2)


@pytest.mark.parametrize("beta", [0.5, 5.0])
def test_every_label_follows_a_dirichlet_law_of_its_own(beta: float) -> None:
    count, each, draws = 4, 400, 250
    labels = np.repeat(np.arange(2, dtype=np.uint64), each)
    dealt = (dirichlet_label(labels, count, beta, seed, 0) for seed in range(draws))
    parts = np.array([[np.bincount(labels[share].astype(int), minlength=2) for share in shares] for shares in dealt])
    parts = parts / each  # [draws, client, label]: the client's share of the label's rows
    variance = (count - 1) / (count**2 * (count * beta + 1))
    assert parts.mean(axis=0) == pytest.approx(1 / count, abs=4 * (variance / draws) ** 0.5)
    assert parts.var() == pytest.approx(variance, rel=0.15)
    between = np.corrcoef(parts[:, 0, 0], parts[:, 0, 1])[0, 1]
    assert abs(between) < 4 / draws**0.5  # two labels of one client have nothing to do with each other


@pytest.mark.parametrize("n", [50, 500, 5_000, 50_000])
def test_rounding_vanishes_as_n_grows(n: int) -> None:
    proportions = np.random.default_rng(1).dirichlet(np.ones(10))
    assert np.abs(largest_remainder(proportions, n) / n - proportions).max() <= 1 / n


@pytest.mark.parametrize("n", [1_000, 10_000, 100_000])
def test_sizes_are_the_drawn_proportions_to_rounding(n: int) -> None:
    drawn = generator(3, "dirichlet-quantity", n, 6).dirichlet(np.full(6, 2.0))
    sizes = np.array([len(share) for share in dirichlet_quantity(n, 6, 2.0, 3)])
    assert np.abs(sizes / n - drawn).max() <= 1 / n


@pytest.mark.parametrize("n", [1_000, 10_000, 100_000])
def test_each_labels_shares_are_its_own_drawn_proportions_to_rounding(n: int) -> None:
    labels = np.random.default_rng(0).integers(3, size=n).astype(np.uint64)
    shares, rng = dirichlet_label(labels, 6, 30.0, 4), generator(4, "dirichlet-label", n, 6)
    for rows_ in group(labels):
        drawn = rng.dirichlet(np.full(6, 30.0))
        rng.permutation(rows_)
        found = np.array([np.isin(share, rows_).sum() for share in shares]) / len(rows_)
        assert np.abs(found - drawn).max() <= 1 / len(rows_)


def test_which_rows_a_client_gets_is_shuffled_and_depends_on_the_seed() -> None:
    first, second = (plain(dirichlet_quantity(200, 4, 1.0, seed)) for seed in (0, 1))
    assert first != second
    assert any(share != list(range(share[0], share[0] + len(share))) for share in first)


@pytest.mark.parametrize("beta", [1e-300, 1e-9, 1e-3])
def test_a_law_that_cannot_honour_min_size_is_refused(beta: float) -> None:
    message = r"none of 1000 Dirichlet draws .* 10 clients .* 100 rows; raise beta"
    with pytest.raises(BadInput, match=message):
        dirichlet_quantity(100, 10, beta, 0)
    with pytest.raises(BadInput, match=message):
        dirichlet_label(np.zeros(100, dtype=np.uint64), 10, beta, 0)


@pytest.mark.parametrize("beta", [1e9, 1e308])
def test_a_huge_beta_is_an_even_split(beta: float) -> None:
    assert [len(share) for share in dirichlet_quantity(100, 4, beta, 0)] == [25] * 4
    labels = np.repeat(np.arange(3, dtype=np.uint64), (40, 80, 20))
    for share in dirichlet_label(labels, 4, beta, 0):
        assert np.bincount(labels[share].astype(np.int64)).tolist() == [10, 20, 5]


def test_a_tiny_beta_gives_each_label_to_one_client() -> None:
    labels = np.repeat(np.arange(5, dtype=np.uint64), 30)
    shares = dirichlet_label(labels, 4, 1e-4, 0, min_size=0)
    assert [sum(label in labels[share] for share in shares) for label in range(5)] == [1] * 5


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=12, max_size=80), st.data(), seeds)
def test_the_numbers_of_labels_do_not_matter(labels: list[int], data: st.DataObject, seed: int) -> None:
    names = data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=7, max_size=7, unique=True))
    order = list(range(3))
    renamed = np.array([names[label] for label in labels], dtype=np.uint64)
    here = np.array(labels, dtype=np.uint64)
    assert plain(dirichlet_label(renamed, 3, 2.0, seed)) == plain(dirichlet_label(here, 3, 2.0, seed))
    assert plain(by_source(renamed, order)) == plain(by_source(here, order))


def test_label_task_sees_no_labels() -> None:
    rule = PartitionRule("dirichlet-label", label="task")
    assert deal(rule, [0] * 50, 4) == deal(rule, list(range(50)), 4)
    assert deal(PartitionRule("dirichlet-label"), [0] * 50, 4) != deal(
        PartitionRule("dirichlet-label"), [row % 2 for row in range(50)], 4
    )


def test_rows_of_a_label_are_shuffled_before_they_are_dealt() -> None:
    shares = dirichlet_label(np.zeros(100, dtype=np.uint64), 2, 1e9, 0)
    assert plain(shares) != [list(range(50)), list(range(50, 100))]


def test_groups_are_in_the_order_of_their_first_rows() -> None:
    found = group(np.array([9, 2**64 - 1, 9, 0, 2**64 - 1], dtype=np.uint64))
    assert [rows.tolist() for rows in found] == [[0, 2], [1, 4], [3]]


@pytest.mark.parametrize("tasks", [1, 3, 5])
def test_by_task_gives_a_task_to_its_own_clients_in_equal_parts(tasks: int) -> None:
    rule = PartitionRule("by-task")
    for task in range(tasks):
        sizes = [len(share) for share in deal(rule, [0] * 31, 7, task=task, tasks=tasks)]
        own = [client for client in range(7) if client % tasks == task]
        assert [client for client, size in enumerate(sizes) if size] == own
        assert max(sizes[client] for client in own) - min(sizes[client] for client in own) <= 1


def test_by_task_with_fewer_clients_than_tasks_is_refused() -> None:
    with pytest.raises(BadInput, match="by-task needs a client for each of 4 tasks, got 3 clients"):
        deal(PartitionRule("by-task"), [0] * 31, 3, task=0, tasks=4)


SOURCES = [5, 5, 1, 5, 2, 1, 3, 2, 5, 3, 4]  # sizes: 5 → 4, 1, 2 and 3 → 2 each, 4 → 1


@pytest.mark.parametrize(
    ("order", "shares"),
    [
        ([0], [list(range(11))]),
        ([0, 1], [[0, 1, 3, 6, 8, 9], [2, 4, 5, 7, 10]]),  # 5 | 1, 2 | 3 goes to the first of two equals, 4
        ([1, 0], [[2, 4, 5, 7, 10], [0, 1, 3, 6, 8, 9]]),
        ([0, 1, 2], [[0, 1, 3, 8], [2, 5, 6, 9], [4, 7, 10]]),
        ([0, 1, 2, 3, 4, 5], [[0, 1, 3, 8], [2, 5], [4, 7], [6, 9], [10], []]),
    ],
)
def test_by_source_by_hand(order: list[int], shares: list[list[int]]) -> None:
    assert plain(by_source(np.array(SOURCES, dtype=np.uint64), order)) == shares


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=120), st.integers(1, 8), seeds)
def test_by_source_keeps_sources_whole_and_balances(labels: list[int], count: int, seed: int) -> None:
    rule = PartitionRule("by-source", min_size=0, field="city")
    shares = deal(rule, labels, count, seed)
    holders = {(labels[row], client) for client, share in enumerate(shares) for row in share}
    assert len(holders) == len(set(labels))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= max(labels.count(source) for source in labels)


def test_the_first_client_that_falls_short_is_named() -> None:
    shares: list[Indices] = [np.arange(size) for size in (3, 1, 2, 0)]
    for least, client, got in ((3, 1, 1), (1, 3, 0)):
        message = f"partition: client {client} must hold at least {least} rows, got {got}; lower partition.min_size"
        with pytest.raises(BadInput, match=message):
            check_sizes(tuple(shares), least)
    assert len(check_sizes(tuple(shares), 0)) == 4


def test_by_source_with_fewer_sources_than_clients_is_refused_unless_clients_may_hold_nothing() -> None:
    with pytest.raises(BadInput, match=r"client \d must hold at least 1 rows, got 0"):
        deal(PartitionRule("by-source", field="city"), [1, 1, 2], 3)
    shares = deal(PartitionRule("by-source", field="city", min_size=0), [1, 1, 2], 3)
    assert sorted(map(len, shares)) == [0, 1, 2]


@pytest.mark.parametrize("kind", ["dirichlet", "dirichlet-label", "iid", "by-task"])
def test_too_few_rows_are_refused(kind: str) -> None:
    with pytest.raises(BadInput, match="10 clients with at least 3 rows each need 30 training rows, got 29"):
        deal(PartitionRule(kind, min_size=3), [0] * 29, 10)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "dirichelt"}, "kind: unknown 'dirichelt'; did you mean 'dirichlet'"),
        ({"kind": "by_task"}, "kind: unknown 'by_task'; did you mean 'by-task'"),
        ({"beta": 0.0}, "beta: must be a finite number above 0, got 0"),
        ({"beta": -1.0}, "beta: must be"),
        ({"beta": float("inf")}, "beta: must be"),
        ({"beta": float("nan")}, "beta: must be"),
        ({"min_size": 0}, "min_size: must be at least 1 with kind dirichlet"),
        ({"kind": "iid", "min_size": 0}, "min_size: must be at least 1 with kind iid"),
        ({"kind": "dirichlet-label", "min_size": 0}, "min_size: must be at least 1 with kind dirichlet-label"),
        ({"kind": "by-task", "min_size": -1}, "min_size: must be at least 0 with kind by-task, got -1"),
        ({"kind": "dirichlet-label", "label": "answers"}, "label: unknown 'answers'; did you mean 'answer'"),
        ({"kind": "dirichlet-label", "label": "source"}, "field: must be there with by-source or label: source"),
        ({"kind": "iid", "label": "task"}, "label: must be left out unless kind is dirichlet-label, got 'task'"),
        ({"kind": "by-source"}, "field: must be there with by-source or label: source, and only then, got ''"),
        ({"kind": "iid", "field": "city"}, "field: must be .* and only then, got 'city'"),
        ({"kind": "file"}, "file: must be there with kind: file, and only then, got ''"),
        ({"kind": "iid", "file": "a.json"}, "file: must be there with kind: file, and only then, got 'a.json'"),
    ],
)
def test_a_rule_out_of_range_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        PartitionRule(**wrong)


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        (PartitionRule(), {"kind": "dirichlet", "beta": 1.0, "min_size": 1}),
        (PartitionRule("iid", min_size=3), {"kind": "iid", "beta": 1.0, "min_size": 3}),
        (
            PartitionRule("dirichlet-label", 0.5, label="source", field="city"),
            {"kind": "dirichlet-label", "beta": 0.5, "min_size": 1, "label": "source", "field": "city"},
        ),
    ],
)
def test_the_hash_is_told_only_keys_that_differ_from_their_default(rule: PartitionRule, told: dict[str, Any]) -> None:
    assert describe(rule) == told
    assert rule.source == (rule.field or None)
