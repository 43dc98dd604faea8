"""Boxes in answers: "[x1, y1, x2, y2]" as parts of a square picture. Right is an intersection over union above 0.5."""

import re
from collections.abc import Callable

Box = tuple[float, float, float, float]
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
ENOUGH = 0.5


def iou(prediction: str, answer: str) -> float:
    """1.0 when the four numbers in the prediction are a box that covers the answer's; any other text is wrong.

    >>> iou("The box is [0.0, 0.0, 0.5, 0.67].", "[0, 0, 0.5, 0.7]"), iou("left", "[0, 0, 0.5, 0.7]")
    (1.0, 0.0)
    """
    return _covers(prediction, answer, read)


def fcit_iou(prediction: str, answer: str) -> float:
    """The same by FCIT's published rule for Grounding, which reads the prediction wrongly.

    The code (arXiv 2503.12897) takes the brackets away and then also the first and the last character, so y2
    loses its last digit: "0.67" counts as 0.6, "0.5" as 0, and "1" makes the text unreadable. x1 loses its 0, or a 1:
    "1.0" counts as 0. Kept so that scores are comparable with published ones; `iou` reads all four numbers.

    >>> fcit_iou("[0.0, 0.0, 0.5, 0.5]", "[0.0, 0.0, 0.5, 0.5]")
    0.0
    """
    return _covers(prediction, answer, read_as_fcit)


def read(text: str) -> Box | None:
    """The box in a text that holds exactly four numbers."""
    return _box(NUMBER.findall(text))


def read_as_fcit(text: str) -> Box | None:
    """The box that FCIT's published code finds.

    >>> read_as_fcit("[0.12, 0.34, 0.56, 0.67]")
    (0.12, 0.34, 0.56, 0.6)
    """
    bare = text.strip().replace("[", "").replace("]", "")
    return _box(bare[1:-1].split(","))


def overlap(first: Box, second: Box) -> float:
    """Intersection over union; 0.0 for boxes without an area."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    common = max(0.0, width) * max(0.0, height)
    union = _area(first) + _area(second) - common
    return common / union if union > 0 else 0.0


def _covers(prediction: str, answer: str, reader: Callable[[str], Box | None]) -> float:
    found, wanted = reader(prediction), read(answer)
    return float(found is not None and wanted is not None and overlap(found, wanted) > ENOUGH)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _box(numbers: list[str]) -> Box | None:
    try:
        x1, y1, x2, y2 = map(float, numbers)
    except ValueError:  # not four, or not numbers
        return None
    return x1, y1, x2, y2
