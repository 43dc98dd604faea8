"""Rules of short answers: when an answer counts."""

import pytest

from fedstrata.core.answers import (
    exact_match,
    fcit_exact,
    fcit_substring,
    normalise,
    option,
    option_letter,
    substring,
)


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


@pytest.mark.parametrize(("given", "points"), [("Red", 1.0), (" rEd\n", 1.0), ("red.", 0.0), ("", 0.0), ("reds", 0.0)])
def test_fcits_rule_forgives_case_and_outer_white_space_alone(given: str, points: float) -> None:
    assert fcit_exact(given, "red") == points


@pytest.mark.parametrize(
    "given",
    [
        "B",
        "b",
        " B\n",
        "(B)",
        "(b)",
        "[b]",
        "b)",
        "B)",
        "B. a cat",
        "b. a cat",
        "B: a cat",
        "Answer: B",
        "**B**",
        "B, not C",
    ],
)
def test_the_first_letter_that_stands_alone_is_the_option(given: str) -> None:
    assert option(given) == "B"
    assert option_letter(given, "B") == 1.0
    assert option_letter(given, "C") == 0.0


@pytest.mark.parametrize(
    "given",
    [
        "",
        "a cat",
        "A cat",
        "Boat",
        "I think so",
        "e.g. this",
        "B-52",
        "T-B",
        "I'd",
        "B's",
        "Q",
        "42",
        "the vitamin b diet",
    ],
)
def test_a_text_without_an_option_letter_is_wrong(given: str) -> None:
    assert option(given) is None
    assert option_letter(given, "A") == option_letter(given, given) == 0.0


def test_the_answers_option_may_be_written_out_too() -> None:
    assert option_letter("(b)", "B. a cat") == 1.0
    assert option_letter("A. a dog", "A") == 1.0
    assert option("A cat, so D") == "D"  # an article is passed over


@pytest.mark.parametrize(
    ("given", "faithful", "corrected"),
    [
        ("dark red", 1.0, 1.0),
        ("RED", 1.0, 1.0),
        ("", 1.0, 0.0),  # "" is part of every text
        (" \n", 1.0, 0.0),
        ("e", 1.0, 0.0),  # a letter of it
        ("dark r", 1.0, 0.0),
        ("dark red bars", 0.0, 0.0),  # more than the answer
        ("bar dark", 0.0, 0.0),
    ],
)
def test_part_of_the_answer_as_published_and_corrected(given: str, faithful: float, corrected: float) -> None:
    assert fcit_substring(given, "Dark Red bar") == faithful
    assert substring(given, "Dark Red bar") == corrected


@pytest.mark.parametrize(
    ("given", "answer", "points"),
    [
        ("5", "0.5", 0.0),
        ("5", "-5", 0.0),
        ("-5", "-5", 1.0),
        ("0.5", "about 0.5 m", 1.0),
        ("20", "10-20", 1.0),  # a range, not a minus sign
        ("1,000", "1,000 men", 1.0),
        ("1", "1,000 men", 0.0),
        (".", "yes.", 0.0),  # no word
        ("yes", "yes.", 1.0),
    ],
)
def test_numbers_are_whole_words(given: str, answer: str, points: float) -> None:
    assert substring(given, answer) == points
