"""Metrics of captions, against values worked out by hand."""

import importlib
import subprocess
import sys
from importlib.metadata import version
from math import exp, sqrt

import numpy as np
import pytest

from fedstrata.core.captions import bleu_counts, cider_d, frequencies, meteor, rouge_l, tokens
from fedstrata.core.scoring import SCORERS

DOG, CAT = ("A dog runs fast.",), ("The cat sleeps now.",)


def value(metric: str, *pairs: tuple[str, tuple[str, ...]], corpus: tuple[tuple[str, ...], ...] = ()) -> float:
    """The score of (prediction, references) pairs."""
    scorer = SCORERS[metric]
    context = scorer.context(corpus or [references for _, references in pairs])
    total = sum((scorer.measure(*pair, context) for pair in pairs), np.zeros(scorer.size))
    return scorer.finish(total, len(pairs))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A man, in a (red) hat -- isn't it?", "a man in a red hat is n't it"),
        ('"Two dogs" play; one sleeps...', "two dogs play one sleeps"),
        ("A dog. A cat!\nThe end.", "a dog a cat the end"),
        ("The dog's ball costs $5.50", "the dog 's ball costs $ 5.50"),
        ("a well-known man", "a well-known man"),
        (" . ", ""),
        ("", ""),
    ],
)
def test_tokens_are_small_treebank_words_without_punctuation(text: str, words: str) -> None:
    assert list(tokens(text)) == words.split()


def test_bleu_counts_a_repeated_word_as_often_as_the_reference_has_it() -> None:
    # "the" is there twice: 2 of 4; 4 words for 6: brevity penalty e^(1 − 6/4); no bigram matches
    pair = ("the the the the", ("The cat is on the mat.",))
    assert bleu_counts(*pair) == [2, 0, 0, 0, 4, 3, 2, 1, 4, 6]
    assert value("bleu1", pair) == pytest.approx(100 * exp(-0.5) * 2 / 4)
    assert value("bleu2", pair) == value("bleu4", pair) == 0.0


def test_bleu_is_the_geometric_mean_of_its_precisions() -> None:
    # 5/6 · 4/5 · 3/4 · 2/3: the last word is wrong
    pair = ("a dog runs in the park", ("a dog runs in the snow",))
    for order, product in enumerate((5 / 6, 4 / 6, 3 / 6, 2 / 6), 1):
        assert value(f"bleu{order}", pair) == pytest.approx(100 * product ** (1 / order))


def test_bleu_compares_lengths_with_the_closest_reference_the_shorter_of_two() -> None:
    counts = bleu_counts("a b c d e", ("a b c d", "a b c d e f", "a b c d e f g h i"))
    assert counts[-2:] == [5, 4]
    assert counts[:4] == [5, 4, 3, 2]  # matched in any of the references


def test_bleu_is_of_the_corpus_and_not_a_mean_of_captions() -> None:
    # 1 of 1 and 0 of 3 words: 1/4, and not (1 + 0)/2
    assert value("bleu1", ("dogs", ("dogs",)), ("one two three", ("four five six",))) == pytest.approx(25)


def test_identical_captions_have_all_of_bleu_and_rouge() -> None:
    pairs = [(DOG[0], DOG), (CAT[0], CAT)]
    for metric in ("bleu1", "bleu2", "bleu3", "bleu4", "rouge_l"):
        assert value(metric, *pairs) == 100.0


def test_meteor_of_identical_captions_lacks_the_penalty_of_one_chunk() -> None:
    assert meteor(DOG[0], DOG) == 1 - 0.5 * (1 / 4) ** 3
    assert value("meteor", (DOG[0], DOG)) == 100 * (1 - 0.5 / 64)


def test_meteor_weighs_precision_recall_and_chunks() -> None:
    # P = 1, R = 2/3, Fmean = (2/3) / (0.9 + 0.1 · 2/3) = 20/29; two matches in two chunks: times 1 − 0.5
    assert meteor("the dog", ("the big dog",)) == pytest.approx(10 / 29)


def test_meteor_matches_stems_but_needs_no_synonyms() -> None:
    assert meteor("dogs run", ("dog runs",)) == 1 - 0.5 * (1 / 2) ** 3
    assert meteor("car", ("automobile",)) == 0.0
    assert meteor("dogs run", ("nothing", "dog runs")) == 1 - 0.5 / 8  # the best reference counts


def test_rouge_l_is_a_weighted_mean_of_precision_and_recall() -> None:
    # longest common subsequence 2 of 3 and 2 of 2 words: P = 2/3, R = 1, β² = 1.44
    assert rouge_l("dogs run fast", ("Dogs run.",)) == pytest.approx(2.44 * (2 / 3) / (1 + 1.44 * 2 / 3))
    assert rouge_l("fast dogs run", ("dogs run fast",)) == pytest.approx(2 / 3)  # in order, not side by side


def test_rouge_l_takes_precision_and_recall_from_different_references() -> None:
    # P = 4/4 of the first, R = 1/1 of the second, as COCO's evaluation has it
    assert rouge_l("red dogs run fast", ("red dogs run fast past the old house", "dogs")) == 1.0


def test_cider_of_an_identical_caption_is_10_where_all_n_grams_are_its_own() -> None:
    context = frequencies([DOG, CAT])
    assert cider_d(DOG[0], DOG, context) == pytest.approx(10)
    assert cider_d(CAT[0], DOG, context) == 0.0
    assert cider_d(DOG[0], (DOG[0], CAT[0]), context) == pytest.approx(5)  # mean over references


def test_cider_of_a_short_caption() -> None:
    # every idf is log 2: cosines 2/(√2·√4), 1/(1·√3), 0, 0; two words missing: e^(−4/72)
    wanted = 10 * exp(-4 / 72) * (1 / sqrt(2) + 1 / sqrt(3)) / 4
    assert cider_d("a dog", DOG, frequencies([DOG, CAT])) == pytest.approx(wanted)


def test_cider_does_not_reward_repeating_a_word() -> None:
    # n = 1: min(4, 1)·1 / (4·√4); no longer n-gram matches
    assert cider_d("dog dog dog dog", DOG, frequencies([DOG, CAT])) == pytest.approx(10 * (1 / 8) / 4)


def test_cider_counts_pictures_and_not_captions() -> None:
    context = frequencies([("a dog", "a dog dog"), ("a cat",), ("a bird",)])
    assert (context.pictures, context.counts[("dog",)], context.counts[("a",)]) == (3, 1, 3)
    assert cider_d("a", ("a dog",), context) == 0.0


def test_cider_of_a_single_picture_is_0() -> None:
    assert value("cider", (DOG[0], DOG)) == 0.0


def test_cider_needs_the_references_of_the_whole_split() -> None:
    alone, whole = value("cider", ("a dog", DOG)), value("cider", ("a dog", DOG), corpus=(DOG, CAT, CAT))
    assert alone == 0.0
    assert whole > 0.0


def test_cider_is_cut_at_100() -> None:
    assert value("cider", (DOG[0], DOG), (CAT[0], CAT)) == 100.0


def test_the_average_is_the_plain_mean_of_seven() -> None:
    # "a dog" for "a dog runs fast": P = 1, R = 1/2, brevity penalty 1/e, no trigram
    cider_part = 10 * exp(-4 / 72) * (1 / sqrt(2) + 1 / sqrt(3)) / 4
    meteor_part = 0.5 / (0.9 + 0.05) * (1 - 0.5 / 8)
    rouge_part = 2.44 * 0.5 / (0.5 + 1.44)
    wanted = 100 * (exp(-1) + exp(-1) + 0 + 0 + meteor_part + rouge_part + cider_part) / 7
    assert value("caption_average", ("a dog", DOG), corpus=(DOG, CAT)) == pytest.approx(wanted)


def test_the_average_takes_cider_uncut_and_is_cut_itself() -> None:
    # one of four captions right, three of one wrong word: 7 words for 16, 4/7 of them and all longer n-grams matched
    wrong = [("x", CAT), ("x", ("some birds fly away",)), ("x", ("two men sit down",))]
    bleus = [exp(1 - 16 / 7) * (4 / 7) ** (1 / order) for order in (1, 2, 3, 4)]
    means = [(1 - 0.5 / 64) / 4, 1 / 4, 10 / 4]
    assert value("caption_average", (DOG[0], DOG), *wrong) == pytest.approx(100 * (sum(bleus) + sum(means)) / 7)
    assert value("caption_average", (DOG[0], DOG), (CAT[0], CAT)) == 100.0  # and not (5 · 100 + 99.2 + 1000) / 7


@pytest.mark.parametrize("metric", ["bleu1", "bleu4", "meteor", "rouge_l", "cider", "caption_average"])
@pytest.mark.parametrize("text", ["", " . ", "?!"])
def test_captions_without_a_word_have_0(metric: str, text: str) -> None:
    assert value(metric, (text, DOG), corpus=(DOG, CAT)) == 0.0
    assert value(metric, (text, ("",)), corpus=(DOG, CAT)) == 0.0
    assert value(metric, (DOG[0], (text,)), corpus=(DOG, CAT)) == 0.0


def test_cider_of_captions_that_share_nothing_is_0() -> None:
    context = frequencies([DOG, CAT])
    assert cider_d("blue", DOG, context) == cider_d("", DOG, context) == 0.0


def test_the_libraries_wait_for_the_first_caption() -> None:
    code = "import sys, fedstrata.core.scoring; print({'nltk', 'sacrebleu', 'rouge_score'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_cider_is_aac_metrics_own_and_its_version_is_the_pinned_one() -> None:
    library = importlib.import_module("aac_metrics.functional.cider_d")
    assert version("aac-metrics") == "0.5.4"  # core/cider.py calls its inner steps
    texts = ["a red cat sits on a mat", "two dogs run", "a man rides a red bike up a hill", "dogs sit on a hill"]
    references = [[text, f"{text} today", "a red thing"] for text in texts]
    said = ["a red cat on a mat", "dogs run run run", "a bike", "a cat"]
    _, whole = library.cider_d(said, references)
    context = frequencies([tuple(refs) for refs in references])
    ours = [cider_d(text, tuple(refs), context) for text, refs in zip(said, references, strict=True)]
    assert ours == pytest.approx(whole["cider_d"].tolist(), rel=1e-12)
