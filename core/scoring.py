"""Scorers: how a generated answer is compared with the reference."""

from collections.abc import Callable, Mapping


def normalise(text: str) -> str:
    """Case, surrounding white space and a final full stop do not count."""
    return text.strip().removesuffix(".").strip().casefold()


def exact_match(prediction: str, answer: str) -> float:
    """1.0 when both are equal after `normalise`, else 0.0.

    >>> exact_match(" Red. ", "red"), exact_match("", "red")
    (1.0, 0.0)
    """
    return float(normalise(prediction) == normalise(answer))


SCORERS: Mapping[str, Callable[[str, str], float]] = {"exact_match": exact_match}
