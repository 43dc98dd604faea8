"""The accuracy matrix: every expected number is worked out by hand from the rows written here."""

import json
from typing import Any

import pytest

from fedstrata.core.errors import BadInput
from fedstrata.core.metrics import KEYS, AccuracyMatrix

NAMES = ("a", "b", "c")


def make(rows: list[list[float]], trained: list[str], tasks: tuple[str, ...] = NAMES) -> AccuracyMatrix:
    """`trained[t]` holds the letters of the tasks trained in stage t + 1; `rows[0]` is before training."""
    matrix = AccuracyMatrix(tasks, tuple(trained), ("exact_match",) * len(tasks))
    for row, letters in zip(rows, ["", *trained], strict=False):
        scores = dict(zip(tasks, row, strict=True))
        matrix = matrix.add_row(scores, set(letters), dict.fromkeys(tasks, 50))
    return matrix


HOMOGENEOUS = [
    [0.0, 10.0, 20.0],
    [90.0, 12.0, 20.0],
    [70.0, 80.0, 26.0],
    [60.0, 50.0, 70.0],
]


def test_one_new_task_per_stage() -> None:
    matrix = make(HOMOGENEOUS, ["a", "b", "c"])
    assert matrix.last == pytest.approx(60.0)  # (60 + 50 + 70) / 3
    assert matrix.avg == pytest.approx(75.0)  # (90 + (70 + 80) / 2 + 60) / 3
    assert matrix.forgetting == pytest.approx(30.0)  # ((90 - 60) + (80 - 50)) / 2
    assert matrix.bwt == pytest.approx(-30.0)
    assert matrix.fwt == pytest.approx(4.0)  # ((12 - 10) + (26 - 20)) / 2


def test_forgetting_takes_the_best_past_score_and_backward_transfer_the_first() -> None:
    matrix = make([[0, 0, 0], [40, 0, 0], [90, 50, 0], [60, 50, 70]], ["a", "b", "c"])
    assert matrix.forgetting == pytest.approx(15.0)  # ((90 - 60) + (50 - 50)) / 2
    assert matrix.bwt == pytest.approx(10.0)  # ((60 - 40) + (50 - 50)) / 2


def test_forgetting_is_negative_when_tasks_go_on_improving() -> None:
    matrix = make([[0, 0, 0], [40, 0, 0], [60, 50, 0]], ["a", "b", "c"])
    assert matrix.forgetting == pytest.approx(-20.0)


def test_a_score_from_before_a_task_was_trained_is_nothing_to_forget() -> None:
    matrix = make([[0, 99, 0], [50, 99, 0], [50, 60, 0], [50, 60, 10]], ["a", "b", "c"])
    assert matrix.forgetting == pytest.approx(0.0)


def test_heterogeneous_stages_with_several_new_tasks_and_revisits() -> None:
    # Stage 1 trains a and b, stage 2 trains a again, stage 3 brings c and d and trains b again.
    rows: list[list[float]] = [[0, 0, 10, 20], [80, 60, 10, 22], [90, 40, 16, 24], [70, 65, 50, 30]]
    matrix = make(rows, ["ab", "a", "bcd"], ("a", "b", "c", "d"))
    assert matrix.seen == ((False,) * 4, (True, True, False, False), (True, True, False, False), (True,) * 4)
    assert matrix.last == pytest.approx(53.75)  # (70 + 65 + 50 + 30) / 4
    assert matrix.avg == pytest.approx((70 + 65 + 53.75) / 3)
    assert matrix.forgetting == pytest.approx(7.5)  # ((90 - 70) + (60 - 65)) / 2
    assert matrix.bwt == pytest.approx(-2.5)  # ((70 - 80) + (65 - 60)) / 2
    assert matrix.fwt == pytest.approx(5.0)  # c: 16 - 10, d: 24 - 20


def test_a_task_that_is_never_trained_counts_nowhere() -> None:
    matrix = make([[0, 0, 100], [50, 0, 100], [40, 60, 100]], ["a", "b"])
    assert (matrix.last, matrix.avg) == (pytest.approx(50.0), pytest.approx(50.0))
    assert matrix.final == {"a": 40.0, "b": 60.0, "c": 100.0}


def test_all_tasks_in_the_first_stage_leave_no_forward_transfer() -> None:
    matrix = make([[0, 0, 0], [50, 50, 50], [60, 60, 60]], ["abc", "abc"])
    assert (matrix.fwt, matrix.bwt, matrix.forgetting) == (None, pytest.approx(10.0), pytest.approx(-10.0))


def test_an_interrupted_run_gives_values_over_the_rows_it_has() -> None:
    matrix = make(HOMOGENEOUS[:3], ["a", "b", "c"])
    assert matrix.done == 2
    assert (matrix.last, matrix.avg) == (pytest.approx(75.0), pytest.approx(82.5))
    assert (matrix.forgetting, matrix.bwt, matrix.fwt) == (
        pytest.approx(20.0),
        pytest.approx(-20.0),
        pytest.approx(2.0),
    )


@pytest.mark.parametrize("rows", [0, 1])
def test_nothing_is_defined_before_the_first_stage(rows: int) -> None:
    matrix = make(HOMOGENEOUS[:rows], ["a", "b", "c"])
    values = (matrix.last, matrix.avg, matrix.forgetting, matrix.bwt, matrix.fwt, matrix.vocabulary_rate)
    assert values == (None,) * 6


def test_one_stage_has_a_last_and_an_avg_and_nothing_to_transfer() -> None:
    matrix = make(HOMOGENEOUS[:2], ["a"])
    assert (matrix.last, matrix.avg) == (90.0, 90.0)
    assert (matrix.forgetting, matrix.bwt, matrix.fwt) == (None, None, None)


def test_the_vocabulary_rate_averages_the_seen_tasks_that_have_a_vocabulary() -> None:
    matrix = AccuracyMatrix(NAMES, ("1",), ("exact_match",) * 3)
    counts = dict.fromkeys(NAMES, 5)
    matrix = matrix.add_row(dict.fromkeys(NAMES, 0.0), (), counts)
    matrix = matrix.add_row(dict.fromkeys(NAMES, 0.0), "ab", counts, {"a": 80.0, "b": None, "c": 10.0})
    assert matrix.vocabulary_rate == 80.0


def test_json_has_exactly_the_promised_keys_and_comes_back_equal() -> None:
    matrix = make(HOMOGENEOUS, ["a", "b", "c"])
    tree = json.loads(json.dumps(matrix.to_json()))
    assert tuple(tree) == KEYS
    assert AccuracyMatrix.from_json(tree) == matrix


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version must be 1"),
        ({"extra": 1}, "exactly the keys"),
        ({"scores": [[0, 0, 101]]}, "not an accuracy matrix"),
        ({"scores": [[0, 0, float("nan")]]}, "between 0 and 100"),
        ({"scores": [[0, 0]]}, "every row must have 3"),
        ({"scores": [["x", 0, 0]]}, "not an accuracy matrix"),
        ({"seen": [[True, False, False]]}, "false in row 0"),
        ({"counts": [[1.5, 1, 1]]}, "whole numbers"),
        ({"tasks": ["a", "a", "b"]}, "different names"),
        ({"tasks": None}, "not an accuracy matrix"),
    ],
)
def test_a_broken_matrix_file_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    tree = make(HOMOGENEOUS[:1], ["a", "b", "c"]).to_json() | change
    with pytest.raises(BadInput, match=rf"^run/matrix\.json: .*{message}"):
        AccuracyMatrix.from_json(tree, "run/matrix.json")


def test_a_seen_task_cannot_become_unseen() -> None:
    tree = make(HOMOGENEOUS[:3], ["a", "b", "c"]).to_json()
    tree["seen"][2] = [False, True, False]
    with pytest.raises(BadInput, match="stays seen"):
        AccuracyMatrix.from_json(tree)


def test_a_row_names_every_task_and_fits_into_the_stages() -> None:
    matrix = make(HOMOGENEOUS, ["a", "b", "c"])
    full = dict.fromkeys(NAMES, 1)
    with pytest.raises(ValueError, match="at most 4"):
        matrix.add_row(full, (), full)
    with pytest.raises(ValueError, match="exactly the tasks"):
        matrix.add_row({"a": 1.0}, (), full)
    with pytest.raises(ValueError, match="not tasks of this matrix"):
        matrix.add_row(full, {"d"}, full)
