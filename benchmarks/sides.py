"""What the cohort benchmarks have in common: the engine beside its peers, equal results asserted, one `Result`."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from fedstrata.benchmarks import peers
from fedstrata.benchmarks.cohorts import Sizes, Work, cohort, far, products, work
from fedstrata.benchmarks.measure import Result, paired, ratios, raw

OURS = "ours"
PEFT = "PEFT loop"
ONEDNN = "PEFT loop, oneDNN too"
TRAINER = "a new Trainer, model kept"
TEMPLATE = "a new Trainer, model and adapter"
PFL = "pfl-research 0.6.0"
SAME = 1e-3  # ‖difference‖ / ‖update‖ in float32, where Adam flips the signs of gradients close to 0

Side = Callable[[], Any]
SIDES: Mapping[str, Callable[[Work], Side]] = {
    PEFT: lambda work: peers.PeftLoop(work).round,
    ONEDNN: lambda work: peers.through_onednn(peers.PeftLoop(work).round),
    TRAINER: lambda work: peers.Trainer(work).round,
    TEMPLATE: lambda work: peers.Trainer(work, keep=False).round,
    PFL: lambda work: peers.Pfl(work).round,
}


def compare(
    name: str, what: str, sizes: Sizes, targets: Mapping[str, float], others: Sequence[str], repeats: int
) -> Result:
    """CPU seconds of a round of all clients; `others` are named as in SIDES, targets among them."""
    with work(sizes) as given:
        sides: dict[str, Side] = {OURS: lambda: cohort(given)}
        notes = [f"float32 products of ours: {given.section.matmul}"]
        for other in others:
            try:
                sides[other] = SIDES[other](given)
            except ModuleNotFoundError as error:
                notes.append(f"{other}: left out, {error.name} is not installed: pip install 'fedstrata[bench]'")
        equal = {other: same(side(), sides[OURS](), given) for other, side in sides.items() if other != OURS}
        found = paired(sides, repeats, warm=0)  # all sides have run once, to be compared
        floor = 1000 * products(given)
    took = {side: 1000 * median(costs[side].cpu for costs in found) / sizes.clients for side in sides}
    notes.append("ms per client-round: " + ", ".join(f"{side} {spent:.2f}" for side, spent in took.items()))
    notes.append(f"the products with the base's frozen weights alone, forward and backward: {floor:.2f} ms")
    return Result(
        name=name,
        what=what,
        clock="cpu",
        ratios=ratios(found, OURS, "cpu"),
        targets={other: targets[other] for other in sides if other in targets},
        pairs=raw(found),
        equal={f"{other}, ‖difference‖ / ‖update‖": apart for other, apart in equal.items()},
        notes=tuple(notes),
    )


def same(theirs: Any, ours: Any, given: Work) -> float:
    """How far two rounds are apart; pfl-research keeps only the mean of the clients.

    Raises:
        AssertionError: further than float32 explains.
    """
    start = given.jobs[0].flat
    apart = far(ours, theirs, start) if isinstance(theirs, list) else far([np.mean(ours, axis=0)], [theirs], start)
    if not apart <= SAME:
        raise AssertionError(f"the updates differ by {apart:.1e} of the update")
    return apart
