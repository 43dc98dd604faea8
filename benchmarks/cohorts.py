"""The work of the cohort benchmarks: a small Llama with random weights and clients whose rows have one exact length."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from fedstrata.benchmarks.bases import instructions, llama
from fedstrata.benchmarks.measure import cost
from fedstrata.client.model import BaseModel
from fedstrata.client.training import Job, batches, train
from fedstrata.core import kernels
from fedstrata.core.adapters import Flat, fresh
from fedstrata.core.config import LoraSection, ModelSection, RunConfig, TrainSection
from fedstrata.scenarios.example import Example

SCALING = 2.0
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """A Llama, and what each of C clients trains in one round: one epoch over `rows` rows of `length` tokens."""

    hidden: int
    layers: int
    vocabulary: int
    length: int
    answer: int  # supervised tokens at the end of each row
    batch: int
    rows: int
    clients: int = 16
    rank: int = 8

    @property
    def intermediate(self) -> int:
        """8/3 of the hidden size, in eights."""
        return self.hidden * 8 // 3 // 8 * 8


@dataclass(frozen=True)
class Work:
    """One cohort's work: the base, every client's job, the settings, and the rows of every step as plain tensors."""

    section: ModelSection  # its kernels settled as a run's would be
    base: BaseModel
    jobs: tuple[Job, ...]
    settings: TrainSection
    steps: tuple[tuple[Tensors, ...], ...]  # per client and step: input_ids, attention_mask, labels, as peers take them
    rank: int


@contextmanager
def work(sizes: Sizes) -> Iterator[Work]:
    """Makes the base in a temporary folder. All clients start from one adapter, as they do in a federation."""
    torch.set_num_threads(1)
    settings = TrainSection(lr=1e-3, batch_size=sizes.batch, local_epochs=1, warmup_steps=0)
    with TemporaryDirectory() as name:
        shape = (sizes.hidden, sizes.layers, sizes.vocabulary)
        folder = llama(Path(name), *shape, intermediate=sizes.intermediate, spread=0.02)
        section = kernels.settled(RunConfig(model=ModelSection(name=str(folder), device="cpu"))).model
        base = BaseModel(section, LoraSection())
        start = trained_once(fresh(base.layout, sizes.rank, 0))
        jobs = tuple(Job(examples(sizes, client), start, client) for client in range(sizes.clients))
        yield Work(section, base, jobs, settings, tuple(_steps(base, job, settings) for job in jobs), sizes.rank)


def trained_once(flat: Flat) -> Flat:
    """An adapter as of a later round: from B = 0 Adam's first steps hang on the signs of numbers close to 0."""
    return (flat + np.random.default_rng(0).normal(0, 0.05, flat.shape)).astype(np.float32)


def examples(sizes: Sizes, client: int) -> list[Example]:
    """Random words; the answer's last token is the end of the sequence."""
    rows = instructions(sizes.rows, sizes.length - sizes.answer, sizes.answer, sizes.vocabulary, client)
    return [Example(f"{client}-{number}", row["instruction"], row["output"]) for number, row in enumerate(rows)]


def _steps(base: BaseModel, job: Job, settings: TrainSection) -> tuple[Tensors, ...]:
    rows = base.tokenise(job.examples, settings.max_length)
    plan = batches(len(rows), settings, job.seed)
    return tuple(_tensors([rows[row] for row in step]) for step in plan)


def _tensors(rows: Sequence[Any]) -> Tensors:
    ids = torch.tensor([row.prompt + row.answer for row in rows])
    labels = torch.tensor([(-100,) * len(row.prompt) + row.answer for row in rows])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def cohort(work: Work) -> list[Flat]:
    """The cohort engine: all clients in one call."""
    with _kernel(work):
        return [done.flat for done in train(work.base, work.jobs, work.settings, SCALING)]


@contextmanager
def _kernel(work: Work) -> Iterator[None]:
    kernels.use(work.section)
    try:
        yield
    finally:
        kernels.use(ModelSection(matmul="default"))


def products(work: Work) -> float:
    """CPU seconds of one client-round's products with the base's own frozen weights, and of nothing else.

    Forward and backward of every adapted layer on the rows of one step of all clients at once, and the head's at
    answer positions: a floor under any way of doing this work on this machine.
    """
    steps, clients = work.steps[0], len(work.jobs)
    rows = clients * steps[0]["input_ids"].numel()
    answers = clients * int((steps[0]["labels"] >= 0).sum())
    head = work.base.head.weight
    sizes = [(rows, out, inner) for _, out, inner in work.base.layout.modules] + [(answers, *head.shape)]
    with _kernel(work):
        total = sum(count * _product(*size) for size, count in Counter(sizes).items())
    return total * len(steps) / clients


def _product(rows: int, out: int, inner: int) -> float:
    x, weight, gradient = torch.randn(rows, inner), torch.randn(out, inner), torch.randn(rows, out)
    found = [cost(lambda: (x @ weight.T, gradient @ weight)).cpu for _ in range(3)]
    return median(found)


def far(ours: Sequence[Flat], theirs: Sequence[Flat], start: Flat) -> float:
    """The largest ‖difference‖ / ‖update‖ over the clients."""
    return max(
        float(np.linalg.norm(left.astype(np.float64) - right) / np.linalg.norm(right.astype(np.float64) - start))
        for left, right in zip(ours, theirs, strict=True)
    )
