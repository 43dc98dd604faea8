"""Boxes: intersection over union, and what the published rule loses."""

import pytest

from fedstrata.core.boxes import fcit_iou, iou, overlap, read, read_as_fcit

HALF = "[0.0, 0.0, 0.5, 0.8]"


def test_the_overlap_of_boxes_is_that_of_areas() -> None:
    # 2 × 2 and 2 × 2, moved by (1, 1): 1 in common, 4 + 4 − 1 = 7 together
    assert overlap((0, 0, 2, 2), (1, 1, 3, 3)) == 1 / 7
    assert overlap((0, 0, 2, 2), (0, 0, 2, 2)) == 1.0
    assert overlap((0, 0, 1, 1), (2, 2, 3, 3)) == overlap((0, 0, 1, 1), (1, 0, 2, 1)) == 0.0


@pytest.mark.parametrize("box", [(0.5, 0.5, 0.5, 0.5), (0.8, 0.8, 0.2, 0.2), (0.8, 0.0, 0.2, 1.0)])
def test_boxes_without_an_area_or_turned_over_cover_nothing(box: tuple[float, float, float, float]) -> None:
    assert overlap(box, (0.0, 0.0, 1.0, 1.0)) == overlap(box, box) == 0.0


def test_half_of_the_union_is_not_enough() -> None:
    assert overlap((0, 0, 1, 1), (0, 0, 1, 0.5)) == 0.5
    assert iou("[0, 0, 1, 0.5]", "[0, 0, 1, 1]") == 0.0
    assert iou("[0, 0, 1, 0.51]", "[0, 0, 1, 1]") == 1.0


@pytest.mark.parametrize(
    "given",
    ["[0.12, 0.34, 0.56, 0.67]", "0.12,0.34,0.56,0.67", "It is [.12, 0.34, 5.6e-1, 0.67].", "(0.12 0.34 0.56 0.67)"],
)
def test_four_numbers_are_read_wherever_they_stand(given: str) -> None:
    assert read(given) == (0.12, 0.34, 0.56, 0.67)


@pytest.mark.parametrize(
    "given", ["", "left", "[0.1, 0.2, 0.3]", "[0.1, 0.2, 0.3, 0.4, 0.5]", "[nan, nan, nan, nan]", "]["]
)
def test_unreadable_boxes_are_wrong_by_both_rules(given: str) -> None:
    assert read(given) is None
    assert iou(given, HALF) == fcit_iou(given, HALF) == 0.0


def test_an_unreadable_answer_is_never_right() -> None:
    assert iou(HALF, "") == fcit_iou(HALF, "the left half") == 0.0


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("[0.12, 0.34, 0.56, 0.67]", (0.12, 0.34, 0.56, 0.6)),  # the published slip
        ("0.12, 0.34, 0.56, 0.67", (0.12, 0.34, 0.56, 0.6)),
        ("[0.12, 0.34, 0.56, 0.675]", (0.12, 0.34, 0.56, 0.67)),
        ("[0.12, 0.34, 0.56, 0.67].", (0.12, 0.34, 0.56, 0.67)),  # the full stop is lost in the digit's place
        ("[0.12, 0.34, 0.56, 0.7]", (0.12, 0.34, 0.56, 0.0)),
        ("[1.00, 0.34, 0.56, 0.67]", (0.0, 0.34, 0.56, 0.6)),
        ("[0, 0.34, 0.56, 0.67]", None),
        ("[0.12, 0.34, 0.56, 1]", None),
        ("It is [0.12, 0.34, 0.56, 0.67]", None),
    ],
)
def test_the_published_rule_drops_the_first_and_the_last_character(
    given: str, found: tuple[float, float, float, float] | None
) -> None:
    assert read_as_fcit(given) == found


@pytest.mark.parametrize(
    ("given", "answer", "faithful", "corrected"),
    [
        ("[0.10, 0.10, 0.90, 0.90]", "[0.10, 0.10, 0.90, 0.90]", 1.0, 1.0),  # 0.90 → 0.9: nothing lost
        ("[0.0, 0.0, 0.5, 0.8]", HALF, 0.0, 1.0),  # 0.8 → 0.: no area left
        ("[0.00, 0.00, 0.50, 0.19]", "[0.00, 0.00, 0.50, 0.20]", 0.0, 1.0),  # height 0.1 of 0.2: exactly half
        ("[0.00, 0.00, 0.50, 0.59]", "[0.00, 0.00, 0.50, 0.28]", 1.0, 0.0),  # 28/50 for 28/59
    ],
)
def test_faithful_and_corrected_rules_differ_both_ways(
    given: str, answer: str, faithful: float, corrected: float
) -> None:
    assert (fcit_iou(given, answer), iou(given, answer)) == (faithful, corrected)
