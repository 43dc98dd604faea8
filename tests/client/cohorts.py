"""What tests of cohorts share: examples, and what training made of them before it was rounded for the wire."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from fedstrata.client.batching import batches
from fedstrata.client.lora import Cohort
from fedstrata.client.model import BaseModel
from fedstrata.client.training import Job, train
from fedstrata.core.config import TrainSection
from fedstrata.scenarios.stream import Example, Pixels


def examples(count: int, seed: int = 0, bare: bool = False) -> list[Example]:
    """Noise for pictures; bare: every third is text alone."""
    draw = np.random.default_rng(seed)
    pictures = [Pixels(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]
    words = ["red", "blue green", "the shape", "4"]
    kinds = [None if bare and index % 3 == 1 else picture for index, picture in enumerate(pictures)]
    return [Example(str(i), f"what colour is shape {i}?", words[i % 4], kind) for i, kind in enumerate(kinds)]


def kept(patch: pytest.MonkeyPatch) -> list[Cohort]:
    """The cohorts that training will make, so that their values can be seen in float64."""
    made: list[Cohort] = []
    original = Cohort.of

    def keep(*args: Any) -> Cohort:
        made.append(original(*args))
        return made[-1]

    patch.setattr(Cohort, "of", staticmethod(keep))
    return made


def exact(
    base: BaseModel, jobs: Sequence[Job], settings: TrainSection, scaling: float, **more: Any
) -> list[np.ndarray]:
    """The trained values in float64: what travels is float32, which would hide a difference of 1e-9."""
    with pytest.MonkeyPatch.context() as patch:
        made = kept(patch)
        train(base, jobs, settings, scaling, dtype=torch.float64, **more)
    order = sorted(range(len(jobs)), key=lambda i: -len(batches(len(jobs[i].examples), settings, jobs[i].seed)))
    return [made[0].flat[order.index(i)].detach().numpy() for i in range(len(jobs))]
