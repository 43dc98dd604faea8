"""Every random draw names what it is for, so that any of them can be replayed alone."""

import hashlib

import numpy as np


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed that is a pure function of `seed` and `names`, the same on every machine.

    >>> derive(0, "participants", 1, 2) == derive(0, "participants", 1, 2)
    True
    """
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator seeded by `derive(seed, *names)`."""
    return np.random.default_rng(derive(seed, *names))
