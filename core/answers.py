"""Short answers: when a word, an option's letter or a number is right: (prediction, answer) → 0.0 or 1.0."""

import re

OPTION = re.compile(
    r"""(?<![\w.'’-])(?:          # not inside a word, an abbreviation, or after a hyphen
        [(\[]([A-Ha-h])[)\]]      # (b)  [B]
        | ([A-Ha-h])[).:](?!\S)   # b)  B.  B:
        | ([A-H])(?![\w'’-]|\.\w) # B anywhere ...
          (?!(?<=A)\s+[a-z])      # ... but not the article of "A cat"
    )""",
    re.VERBOSE,
)
WORD = re.compile(r"(?:(?<!\w)[-+])?\d+(?:[.,]\d+)*\w*|\w+|[^\w\s]")


def normalise(text: str) -> str:
    """Case, surrounding white space and a final full stop do not count."""
    return text.strip().removesuffix(".").strip().casefold()


def exact_match(prediction: str, answer: str) -> float:
    """1.0 when both are equal after `normalise`, else 0.0.

    >>> exact_match(" Red. ", "red"), exact_match("", "red")
    (1.0, 0.0)
    """
    return float(normalise(prediction) == normalise(answer))


def fcit_exact(prediction: str, answer: str) -> float:
    """1.0 when both are equal in capitals: FCIT's rule for ImageNet-R, IconQA, OCRVQA, super-CLEVR, TabMWP, ArxivQA,
    AOKVQA and CLEVR-Math (arXiv 2503.12897, published code). Only outer white space does not count.

    >>> fcit_exact("Red", "red"), fcit_exact("red.", "red")
    (1.0, 0.0)
    """
    return float(prediction.strip().upper() == answer.strip().upper())


def option(text: str) -> str | None:
    """The first option letter A–H that stands alone, as a capital; None without one.

    Small letters need a bracket, a full stop or a colon, or stand there alone.

    >>> option("B"), option("(b)"), option("B. a cat"), option("Answer: B"), option("a cat")
    ('B', 'B', 'B', 'B', None)
    """
    found = re.fullmatch(r"\s*([a-h])\s*", text) or OPTION.search(text)
    return next(letter for letter in found.groups() if letter).upper() if found else None


def option_letter(prediction: str, answer: str) -> float:
    """1.0 when the prediction's first option letter is the answer's; a prediction without one is wrong."""
    letter = option(prediction)
    return float(letter is not None and letter == option(answer))


def fcit_substring(prediction: str, answer: str) -> float:
    """1.0 when the prediction is part of the answer, both in capitals: FCIT's rule for FigureQA and DVQA.

    The published code also counts an empty prediction as right, because "" is part of every text, and "e" for "yes".
    That is kept here, so that scores are comparable with published ones; `substring` is the rule without it.
    """
    return float(prediction.strip().upper() in answer.strip().upper())


def substring(prediction: str, answer: str) -> float:
    """1.0 when the prediction's words and numbers follow one another in the answer; at least one is needed.

    >>> substring("dark red", "Dark Red bar"), substring("", "yes"), substring("e", "yes"), substring("5", "0.5")
    (1.0, 0.0, 0.0, 0.0)
    """
    part, whole = (WORD.findall(text.upper()) for text in (prediction, answer))
    if not any(word[-1].isalnum() for word in part):
        return 0.0
    return float(any(whole[at : at + len(part)] == part for at in range(len(whole))))
