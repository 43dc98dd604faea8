"""Answering with mixtures of subspaces: 16 prompts, 16 different mixtures of 8 subspaces, 8 new tokens each.

Ours is what an `evaluate` message runs: an `Answerer` with the knowledge of a federation and a router. A second pair
gives all prompts one mixture, which is then merged into the weights.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from fedstrata.benchmarks.bases import instructions, llama
from fedstrata.benchmarks.measure import Result, Work, paired, ratios, raw
from fedstrata.benchmarks.published import Published
from fedstrata.client.evaluation import Answerer
from fedstrata.client.generation import questions
from fedstrata.client.model import BaseModel
from fedstrata.core.adapters import Flat, Layout, fresh
from fedstrata.core.config import LoraSection, ModelSection
from fedstrata.core.records import Knowledge
from fedstrata.core.seeds import generator
from fedstrata.scenarios.stream import Example
from fedstrata.strategies.base import Inputs, Weights

SCALING, LENGTH = 2.0, 2048
PUBLISHED, BASE = "the published evaluation path (re-implemented)", "bare base"
OURS, MERGED, MERGING = "mixed", "merged", "merged with its merge"


@dataclass(frozen=True)
class Sizes:
    """The base's shape and what is asked of it."""

    hidden: int = 256
    layers: int = 4
    vocabulary: int = 4096
    prompts: int = 16
    length: int = 32  # tokens of a prompt
    new: int = 8
    subspaces: int = 8
    rank: int = 8

    def words(self) -> str:
        """The work in one line."""
        asked = f"{self.prompts} prompts of {self.length} tokens, {self.new} new ones each"
        mixed = f"{self.prompts} mixtures of {self.subspaces} subspaces of rank {self.rank}"
        return f"{asked}; {mixed}; hidden {self.hidden}, {self.layers} layers, 7 Linears each"


@dataclass(frozen=True)
class Given:
    """A router that was told every prompt's weights, by its id."""

    weights_of: Weights
    needs_features: bool = False

    def weights(self, inputs: Inputs) -> Weights:
        return self.weights_of[[int(name) for name in inputs.ids]]


def bench(quick: bool = False) -> Result:
    """CPU seconds of the published path over ours; the limits are ours over the bare base."""
    sizes = Sizes(hidden=32, layers=2, vocabulary=200, prompts=4, length=12, subspaces=3) if quick else Sizes()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        llama(Path(folder), sizes.hidden, sizes.layers, sizes.vocabulary)
        section = ModelSection(name=folder, device="cpu", max_new_tokens=sizes.new)
        base, repeats = BaseModel(section, LoraSection()), 2 if quick else 7
        short, long = (compare(base, each, repeats) for each in (sizes, replace(sizes, length=2 * sizes.length)))
    twice = f"{PUBLISHED}, prompts twice as long"
    return replace(short, ratios={**short.ratios, twice: long.ratios[PUBLISHED]})


def compare(base: BaseModel, sizes: Sizes, repeats: int) -> Result:
    """Ours, the published path and the bare base on one base; raises AssertionError when answers differ."""
    sides = Sides(base, sizes)
    equal = sides.check()
    rounds = paired(sides.named(), repeats)
    over = ratios(rounds, BASE, "cpu")
    return Result(
        name="ssa",
        what=sizes.words(),
        clock="cpu",
        ratios={PUBLISHED: ratios(rounds, OURS, "cpu")[PUBLISHED]},
        targets={PUBLISHED: 8.0, f"{OURS} / {BASE}": 1.4, f"{MERGED} / {BASE}": 1.05},
        limits={f"{side} / {BASE}": over[side] for side in (OURS, MERGED, MERGING)},
        pairs=raw(rounds),
        equal=equal,
        notes=(
            f"{PUBLISHED}: one prompt at a time, the concatenation of all subspaces rebuilt at each layer call",
            f"{MERGED}: all prompts share one mixture, merged in an earlier generation; {MERGING}: merged in this one",
        ),
    )


class Sides:
    """The ways of answering the same prompts."""

    def __init__(self, base: BaseModel, sizes: Sizes) -> None:
        flats = tuple(filled(base.layout, sizes.rank, subspace) for subspace in range(sizes.subspaces))
        self.alphas, self.prompts = mixtures(sizes.prompts, sizes.subspaces), prompts(sizes)
        self.alike = np.repeat(self.alphas[:1], sizes.prompts, axis=0)
        self.rows = questions(base, self.prompts, LENGTH)
        self.published = Published(base, flats, SCALING)
        self.mixed = Answerer(base, Knowledge(flats), Given(self.alphas), SCALING)
        self.merged = Answerer(base, Knowledge(flats), Given(self.alike), SCALING)
        self.bare = Answerer(base, Knowledge(()), Given(self.alphas[:, :0]), SCALING)

    def named(self) -> dict[str, Work]:
        """What is measured."""
        theirs = partial(self.published.answer, self.rows, torch.from_numpy(self.alphas))
        ways = {name: partial(self.ours, who) for name, who in ((OURS, self.mixed), (MERGED, self.merged))}
        return {**ways, PUBLISHED: theirs, BASE: partial(self.ours, self.bare), MERGING: self.merging}

    def ours(self, who: Answerer) -> tuple[str, ...]:
        """One batch of answers."""
        return who.answer(self.prompts, 0, len(self.prompts), LENGTH).texts

    def merging(self) -> tuple[str, ...]:
        """The same as merged, after another mixture took its place."""
        assert self.merged.bank is not None
        self.merged.bank.activate(torch.from_numpy(self.alphas[1:2]), 10**9)
        return self.ours(self.merged)

    def check(self) -> dict[str, str]:
        """What is equal. A word is a token here, so equal texts are equal tokens."""
        for who, alphas in ((self.mixed, self.alphas), (self.merged, self.alike)):
            expected = self.published.answer(self.rows, torch.from_numpy(alphas))
            if list(self.ours(who)) != expected:
                raise AssertionError("ssa: ours and the published path answer differently")
        words = sum(len(text.split()) for text in self.ours(self.mixed))
        if self.ours(self.mixed) == self.ours(self.bare):
            raise AssertionError("ssa: the subspaces change nothing, so the comparison says nothing")
        return {"tokens": f"all {words}, mixed and merged, as the published path's"}


def filled(layout: Layout, rank: int, subspace: int) -> Flat:
    """An adapter whose B is not zero."""
    flat = fresh(layout, rank, 0, subspace)
    noise = generator(1, subspace).normal(0, 0.05, flat.shape)
    return np.asarray(flat + noise, dtype=np.float32)


def mixtures(count: int, subspaces: int) -> Weights:
    """`count` different softmax weights, float32 [count, subspaces], all above 0."""
    scores = generator(2).normal(0, 1, (count, subspaces))
    weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    return np.asarray(weights, dtype=np.float32)


def prompts(sizes: Sizes) -> list[Example]:
    """Questions of random words."""
    rows = instructions(sizes.prompts, sizes.length, 2, sizes.vocabulary, 3)
    return [Example(str(index), row["instruction"], row["output"]) for index, row in enumerate(rows)]
