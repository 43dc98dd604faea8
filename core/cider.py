"""CIDEr-D: Vedantam, Zitnick and Parikh, "CIDEr: Consensus-based Image Description Evaluation", CVPR 2015.

Captions are vectors of tf·idf over their n-grams. idf counts pictures over *all* references of a split, which the
libraries take from whatever they are asked to score: a shard would get its own idf. Hence these few lines.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

ORDERS = 4
SIGMA = 6.0
Tokens = Sequence[str]
Gram = tuple[str, ...]
Vector = Mapping[Gram, float]


@dataclass(frozen=True, eq=False)
class Frequencies:
    """In the references of how many of the `pictures` each n-gram occurs."""

    pictures: int
    counts: Mapping[Gram, int]

    @classmethod
    def of(cls, corpus: Sequence[Sequence[Tokens]]) -> "Frequencies":
        """Of all pictures' references."""
        counts: Counter[Gram] = Counter()
        for references in corpus:
            counts.update(
                {gram for reference in references for n in range(1, ORDERS + 1) for gram in grams(reference, n)}
            )
        return cls(len(corpus), counts)

    def vectors(self, tokens: Tokens) -> list[Vector]:
        """For n = 1 … 4: n-gram → occurrences · idf."""
        counts = [Counter(grams(tokens, n)) for n in range(1, ORDERS + 1)]
        return [{gram: times * self.idf(gram) for gram, times in count.items()} for count in counts]

    def idf(self, gram: Gram) -> float:
        """log(pictures / pictures that have it); an n-gram of no reference counts as in one picture."""
        return math.log(self.pictures / max(1, self.counts.get(gram, 0)))


def grams(tokens: Tokens, n: int) -> Iterable[Gram]:
    return (tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1))


def score(caption: Tokens, references: Sequence[Tokens], frequencies: Frequencies) -> float:
    """CIDEr-D of one caption: 10 · the mean over references and n = 1 … 4 of the similarities, 0–10.

    A similarity is min(c, r)·r / (|c| |r|), which stops a caption from gaining by repeating words, damped by
    exp(−(difference in length)² / 2σ²) with σ = 6. With a single picture every idf, and so every score, is 0.
    """
    mine, similarities = frequencies.vectors(caption), []
    for reference in references:
        damping = math.exp(-((len(caption) - len(reference)) ** 2) / (2 * SIGMA**2))
        pairs = zip(mine, frequencies.vectors(reference), strict=True)
        similarities += [damping * similarity(*pair) for pair in pairs]
    return 10 * math.fsum(similarities) / len(similarities)


def similarity(caption: Vector, reference: Vector) -> float:
    """The clipped cosine of two vectors; 0 when one of them is 0."""
    common = math.fsum(
        min(weight, reference.get(gram, 0.0)) * reference.get(gram, 0.0) for gram, weight in caption.items()
    )
    norms = _norm(caption) * _norm(reference)
    return common / norms if norms else 0.0


def _norm(vector: Vector) -> float:
    return math.sqrt(math.fsum(weight**2 for weight in vector.values()))
