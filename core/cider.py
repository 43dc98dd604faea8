"""CIDEr-D: Vedantam, Zitnick and Parikh, "CIDEr: Consensus-based Image Description Evaluation", CVPR 2015.

The arithmetic is aac-metrics'. Its public function takes the document frequencies from whatever it is asked to score,
but a shard needs those of the whole split: so the steps behind that function are called one by one, here only, and the
version is pinned.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

ORDERS = 4
SIGMA, SCALE = 6.0, 10.0
STEPS = ("__cook_sentence", "__compute_doc_freq", "__compute_cider")
Tokens = Sequence[str]
Gram = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Frequencies:
    """In the references of how many of the `pictures` each n-gram, n = 1 … 4, occurs."""

    pictures: int
    counts: Mapping[Gram, int]

    @classmethod
    def of(cls, corpus: Sequence[Sequence[Tokens]]) -> "Frequencies":
        """Of all pictures' references."""
        cook, count, _ = _library()
        return cls(len(corpus), count([[cook(list(tokens), ORDERS, list) for tokens in refs] for refs in corpus]))


def score(caption: Tokens, references: Sequence[Tokens], frequencies: Frequencies) -> float:
    """CIDEr-D of one caption: 10 · the mean over references and n = 1 … 4 of the similarities, 0–10.

    A similarity is min(c, r)·r / (|c| |r|), which stops a caption from gaining by repeating words, damped by
    exp(−(difference in length)² / 2σ²) with σ = 6. With a single picture every idf, and so every score, is 0.
    """
    cook, _, compute = _library()
    cooked = [cook(list(tokens), ORDERS, list) for tokens in (caption, *references)]
    log_pictures = math.log(frequencies.pictures)
    scores, _ = compute(cooked[:1], [cooked[1:]], frequencies.counts, log_pictures, ORDERS, SIGMA, scale=SCALE)
    return float(scores[0])


@lru_cache(maxsize=1)
def _library() -> tuple[Any, ...]:
    """aac-metrics' steps: tokens → counts of n-grams; references → document frequencies; all of it → scores."""
    module = import_module("aac_metrics.functional.cider_d")
    return tuple(vars(module)[name] for name in STEPS)
