"""What a client message costs: our Ray grid against stock Flower simulation, with the same ClientApp."""

import mmap
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import numpy as np

from fedstrata.benchmarks.grid_side import COHORT, NAME
from fedstrata.benchmarks.measure import Cost, Result, cost, raw
from fedstrata.benchmarks.trees import Side, side

FLAT, NAMED = 1, 448  # arrays of an update: as we ship it, and as PEFT names them
SIZES = (1.0, 10.0)  # MB
TIMES = {"ours": 5, "stock": 1}  # exchanges of one measurement: CPU is counted in ticks of 10 ms
WARM = {"ours": 20, "stock": 2}  # exchanges before it: processes map Ray's shared memory page by page
TARGET = 20.0


def bench(quick: bool = False) -> Result:
    """CPU seconds of each side's whole process tree (server, Ray, actors) per message, wall seconds beside them."""
    clients, repeats, sizes = (4, 1, (0.1,)) if quick else (100, 5, SIZES)
    rounds: list[dict[str, Cost]] = [{} for _ in range(repeats)]
    equal = {}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        sides = {
            which: stack.enter_context(side(NAME, [which, str(clients), "2"], Path(name) / f"{which}.log"))
            for which in ("ours", "stock")
        }
        for size in sizes:
            for arrays in (FLAT, NAMED):
                case = f"{size:g}:{arrays}"
                equal[label(size, arrays)] = same(sides, case)
                for number, round_ in enumerate(rounds):
                    for which in sorted(sides, reverse=bool(number % 2)):
                        spent, sent = sides[which].cost(f"{case} {TIMES[which]}"), clients * TIMES[which]
                        each = Cost(spent.cpu / sent, spent.wall / sent)
                        round_[f"{which}, {label(size, arrays)}"] = each
        where = [shares(sides["ours"], size, clients) for size in sizes]
    pairs = [(size, ours, stock) for size in sizes for ours, stock in ((FLAT, FLAT), (NAMED, NAMED), (FLAT, NAMED))]
    return Result(
        name="grid",
        what=f"one client message, {clients} clients, an update of the same size comes back, two actors",
        clock="cpu",
        ratios={versus(*pair): ratio(rounds, *pair, "cpu") for pair in pairs},
        targets={versus(*pair): TARGET for pair in pairs},
        pairs=raw(rounds),
        equal=equal,
        notes=(
            *(f"wall: {versus(*pair)}: {ratio(rounds, *pair, 'wall'):.1f} x" for pair in pairs),
            f"CPU: server, Ray's processes and actors together; ours goes in cohorts of {COHORT}.",
            *where,
            "The ClientApp hands out updates made beforehand; the server lets go of each reply when it has it.",
        ),
    )


def shares(ours: Side, size: float, clients: int) -> str:
    """Where our time goes, and what nobody can do without: one copy of an update into shared memory."""
    times = 5 * TIMES["ours"]
    spent = ours.shares(f"{size:g}:{FLAT} {times}")
    found = ", ".join(f"{kind} {1000 * seconds / times / clients:.2f}" for kind, seconds in spent.items())
    return f"ours, {label(size, FLAT)}, CPU ms: {found}; one copy into shared memory is {1000 * copy(size):.2f} of them"


def copy(size: float) -> float:
    """CPU seconds of copying an update into shared memory that is mapped already, from memory that is not in a cache.

    The last exchange's updates are 16 to an actor, so the next one to be sent never is in one.
    """
    length = int(size * 1_000_000)
    shared = np.frombuffer(mmap.mmap(-1, COHORT * length), dtype=np.uint8)  # anonymous, shared
    source = np.ones_like(shared)

    def all_of_them() -> None:
        for begin in range(0, len(shared), length):
            shared[begin : begin + length] = source[begin : begin + length]

    all_of_them()
    return median(cost(all_of_them).cpu for _ in range(5)) / COHORT


def label(size: float, arrays: int) -> str:
    """A payload, for people."""
    return f"{size:g} MB in {'one array' if arrays == FLAT else f'{arrays} arrays'}"


def versus(size: float, ours: int, stock: int) -> str:
    """A comparison, for people."""
    if ours == stock:
        return f"stock Flower simulation, {label(size, stock)}"
    return f"stock Flower simulation, {label(size, stock)} as peers ship it (ours: one array)"


def ratio(rounds: list[dict[str, Cost]], size: float, ours: int, stock: int, clock: str) -> float:
    """Median over the rounds of stock / ours."""
    pairs = [(round_[f"stock, {label(size, stock)}"], round_[f"ours, {label(size, ours)}"]) for round_ in rounds]
    return float(median(getattr(theirs, clock) / getattr(mine, clock) for theirs, mine in pairs))


def same(sides: dict[str, Side], case: str) -> str:
    """Warms both sides up; what came must be equal on both."""
    found = {which: [it.ask(f"{case} {WARM[which]}"), it.ask(f"{case} check")][1] for which, it in sides.items()}
    if found["ours"] != found["stock"]:
        raise AssertionError(f"{case}: the replies differ: {found}")
    return f"equal bytes, sum {found['ours'].split()[1]}"
