"""Values of captions against any number of references: BLEU, METEOR, ROUGE-L, CIDEr-D.

The libraries are imported at the first caption: nltk alone takes seconds, and most runs have none.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fedstrata.core import cider

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU

ORDERS = 4  # n-grams of BLEU
BLEU_COUNTS = 2 * ORDERS + 2
BETA = 1.2  # weight of recall in ROUGE-L
PUNCTUATION = """'' ' `` ` ( ) { } . ? ! , : - -- ... ;"""
DROPPED = frozenset(PUNCTUATION.split())  # what COCO's caption evaluation leaves out


@lru_cache(maxsize=4096)
def tokens(text: str) -> tuple[str, ...]:
    """Lower-case Penn Treebank words without punctuation, as in COCO's caption evaluation.

    That uses Stanford's tokenizer; this is nltk's, which needs neither Java nor data. It knows a full stop only at the
    end of a text, so sentences are taken apart first.

    >>> tokens("A dog's ball. It's red!")
    ('a', 'dog', "'s", 'ball', 'it', "'s", 'red')
    """
    from nltk.tokenize.treebank import TreebankWordTokenizer  # type: ignore[import-untyped]

    words = TreebankWordTokenizer()
    sentences = re.split(r"(?<=[.!?])\s+", text.lower().strip())
    return tuple(word for sentence in sentences for word in words.tokenize(sentence) if word not in DROPPED)


def bleu_counts(prediction: str, references: tuple[str, ...]) -> list[int]:
    """What BLEU adds up over captions: matched and possible n-grams for n = 1 … 4, length, closest reference length."""
    found = _bleu().corpus_score([" ".join(tokens(prediction))], [[" ".join(tokens(text))] for text in references])
    return [*found.counts, *found.totals, found.sys_len, found.ref_len]


def bleu(counts: Sequence[int], order: int) -> float:
    """Corpus BLEU, 0–100, of n-grams up to `order`, without smoothing (Papineni et al., ACL 2002)."""
    right, possible = list(counts[:order]), list(counts[ORDERS : ORDERS + order])
    length, wanted = counts[2 * ORDERS :]
    found = _bleu().compute_bleu(right, possible, length, wanted, max_ngram_order=order)
    return min(100.0, float(found.score))  # a perfect score comes out as 100.00000000000004


def meteor(prediction: str, references: tuple[str, ...], context: None = None) -> float:
    """METEOR of one caption, 0–1, the best over its references: Lavie and Agarwal, WMT 2007.

    Fmean = PR / (0.9 P + 0.1 R) times 1 − 0.5 (chunks / matches)³. Words match when they or their Porter stems are
    equal. WordNet's synonyms are left out, so that no score depends on data that somebody has downloaded or not;
    METEOR 1.5, which FCIT calls, has synonyms, paraphrases and other weights, and mostly gives other values.
    """
    from nltk.translate.meteor_score import meteor_score  # type: ignore[import-untyped]

    return float(meteor_score(list(map(tokens, references)), tokens(prediction), wordnet=_NoSynonyms()))


def rouge_l(prediction: str, references: tuple[str, ...], context: None = None) -> float:
    """ROUGE-L of one caption, 0–1: (1 + β²) P R / (R + β² P) with β = 1.2, as in COCO's caption evaluation.

    P and R are the longest common subsequence over either length, each the best over the references (Lin, 2004).
    """
    scores = [_rouge().score(reference, prediction)["rougeL"] for reference in references]
    precision, recall = max(score.precision for score in scores), max(score.recall for score in scores)
    if not precision or not recall:
        return 0.0
    return float((1 + BETA**2) * precision * recall / (recall + BETA**2 * precision))


def frequencies(corpus: Sequence[tuple[str, ...]]) -> cider.Frequencies:
    """What `cider_d` needs to know of the references of a whole split."""
    return cider.Frequencies.of([[tokens(text) for text in references] for references in corpus])


def cider_d(prediction: str, references: tuple[str, ...], context: cider.Frequencies) -> float:
    """CIDEr-D of one caption, 0–10: `cider.score`."""
    return cider.score(tokens(prediction), [tokens(reference) for reference in references], context)


class _NoSynonyms:
    """In WordNet's place."""

    def synsets(self, word: str) -> list[Any]:
        return []


class _Words:
    """Our tokens for rouge-score."""

    tokenize = staticmethod(tokens)


@lru_cache(maxsize=1)
def _bleu() -> "BLEU":
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize="none", smooth_method="none", force=True)  # force: that our texts are tokens is meant


@lru_cache(maxsize=1)
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

    return RougeScorer(["rougeL"], tokenizer=_Words())
