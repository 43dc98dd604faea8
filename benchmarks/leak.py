"""Does memory grow with the rounds? What server and actors hold for themselves, after 20 rounds and after 200."""

import os
import tempfile
from pathlib import Path

from fedstrata.benchmarks.measure import Result
from fedstrata.benchmarks.rounds import rounds
from fedstrata.server.supervise import tree

WORDS = ["federation.actors=2", "federation.rounds_per_stage=999", "train.local_epochs=1"]
GROWTH = "memory after the last round / after the early one"


def bench(quick: bool = False) -> Result:
    """Private memory (USS, Linux) of this process and everything below it, while fcit-mini-short runs on and on.

    The early round is one by which every client has been asked, so that pictures and tokens are in their caches.
    """
    early, last = (4, 8) if quick else (20, 200)
    found: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as name, rounds(Path(name), WORDS, "fcit-mini-short") as run:
        for number in range(1, last + 1):
            run.next()
            if number in (early, last) or number % 20 == 0:
                found[number] = private()
    return Result(
        name="leak",
        what=f"server and two actors of fcit-mini-short after {last} rounds and after {early}, private memory",
        clock="MB",
        ratios={},
        targets={GROWTH: 1.05},
        limits={GROWTH: found[last] / found[early]},
        pairs=tuple({"round": number, "MB": round(size, 1)} for number, size in found.items()),
    )


def private() -> float:
    """MB that this process and those below it would give back if they ended."""
    total = 0
    for pid in tree(os.getpid()):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it ended, or is not ours to look at
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
    return total / 1000
