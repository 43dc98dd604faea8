"""What registered clients cost that do not take part: 10,000 against 100, with 50 in every round."""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from fedstrata.benchmarks.measure import Cost, Result, raw
from fedstrata.benchmarks.trees import side

TIME, MEMORY = "time per round, CPU, many / few clients", "peak memory, many / few clients"
WALL = "time per round, wall, many / few clients"


def bench(quick: bool = False) -> Result:
    """CPU seconds of a round, of server, Ray and actors together; peaks of resident memory of server and actors."""
    few, many, each, repeats = (8, 80, 4, 1) if quick else (100, 10_000, 50, 15)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        sides = {}
        for clients in (few, many):
            folder = Path(name) / str(clients)
            folder.mkdir()
            words = [str(folder), str(clients), str(each), "1" if quick else "2"]
            started = side("fedstrata.benchmarks.scale_side", words, Path(name) / f"{clients}.log")
            sides[str(clients)] = stack.enter_context(started)
        for it in sides.values():
            it.ask("go")
        rounds: list[dict[str, Cost]] = []
        for number in range(repeats):
            costs = {which: sides[which].cost("go") for which in sorted(sides, reverse=bool(number % 2))}
            rounds.append({which: costs[which] for which in sides})
        told = {it.ask("told") for it in sides.values()}
        if len(told) != 1:
            raise AssertionError(f"the sides trained differently: {sorted(told)}")
        memory = {clients: it.peak() for clients, it in sides.items()}
    ratios = {clock: median(getattr(r[str(many)], clock) / getattr(r[str(few)], clock) for r in rounds) for clock in
              ("cpu", "wall")}  # fmt: skip
    return Result(
        name="scale",
        what=f"a round of {each} clients of 2 rows each, of {many:,} registered ones against {few}",
        clock="cpu",
        ratios={},
        targets={TIME: 1.1, WALL: 1.1, MEMORY: 1.2},
        limits={TIME: ratios["cpu"], WALL: ratios["wall"], MEMORY: memory[str(many)] / memory[str(few)]},
        pairs=raw(rounds),
        equal={"each round": told.pop()},
        notes=(f"MB at the peak, server and actors: {', '.join(f'{k}: {v:.0f}' for k, v in memory.items())}",),
    )
