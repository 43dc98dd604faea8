"""Where does strata's `picture_tau` come from? Cosines between the pictures of the base's pre-training tasks.

    python benchmarks/picture_tau.py

Five of them ask about the same kind of picture, a board of objects; every other one has pictures of its own. The
threshold lies halfway between the least cosine of two tasks of one kind and the largest of two kinds. No stream that a
strategy is compared on has a part in it.
"""

import itertools

import numpy as np
import torch

from fedstrata.client.identity import Sight
from fedstrata.client.world import base_of
from fedstrata.core.identity import Token
from fedstrata.scenarios.pretraining import PRETRAINING_TASKS, pretraining_task
from fedstrata.server import configure
from fedstrata.strategies.strata import corrected

BOARDS = frozenset({"inventory", "kind", "where", "size", "extreme"})


def threshold(pictures: int) -> tuple[float, float, float]:
    """(least cosine within a kind, largest between kinds, halfway), from so many pictures a task."""
    torch.set_num_threads(1)
    sight = Sight(base_of(configure.resolve("", ["strategy.name=strata"])))
    mean = {}
    for name in PRETRAINING_TASKS:
        features = sight.encode(pretraining_task(name, 0, pictures, 0, 0).train).double().mean(0)
        mean[name] = corrected(Token(features.float().numpy(), pictures))
    within, between = list[float](), list[float]()
    for a, b in itertools.combinations(mean, 2):
        (within if {a, b} <= BOARDS else between).append(float(np.clip(mean[a] @ mean[b], -1, 1)))
    return min(within), max(between), (min(within) + max(between)) / 2


if __name__ == "__main__":
    least, largest, tau = threshold(400)
    print(f"one kind {least:.3f} or more, two kinds {largest:.3f} or less, halfway {tau:.3f}")
