"""Scorers: when an answer counts."""

import pytest

from fedstrata.core.scoring import SCORERS, exact_match, normalise


@pytest.mark.parametrize("given", ["Red", " red ", "red.", "RED. ", "\tred\n", "red ."])
def test_case_white_space_and_one_final_full_stop_do_not_count(given: str) -> None:
    assert exact_match(given, "red") == 1.0


@pytest.mark.parametrize("given", ["", "re d", "red..", "red!", "reds", "the red", "red, blue"])
def test_anything_else_counts(given: str) -> None:
    assert exact_match(given, "red") == 0.0


def test_an_answer_that_is_a_full_stop_equals_the_empty_one() -> None:
    assert normalise(" . ") == ""


def test_a_decimal_point_inside_is_kept() -> None:
    assert normalise("3.50") == "3.50"
    assert exact_match("3.5", "35") == 0.0


def test_letters_beyond_ascii_fold_their_case() -> None:
    assert exact_match("STRASSE", "straße") == 1.0


def test_exact_match_is_in_the_catalogue() -> None:
    assert SCORERS["exact_match"]("A", "a") == 1.0
