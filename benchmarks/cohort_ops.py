"""Operations dispatched per client-step: what a GPU would be asked to launch. Counted, not timed."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from fedstrata.benchmarks import peers
from fedstrata.benchmarks.cohort_small import SIZES
from fedstrata.benchmarks.cohorts import cohort, work
from fedstrata.benchmarks.measure import Result
from fedstrata.benchmarks.sides import OURS, same

PEER = "PEFT and foreach AdamW"


class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is dispatched while it is open, views left out: they compute nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def bench(quick: bool = False) -> Result:
    """Non-view ATen operations of a whole client-round, its beginning and end included, per client-step."""
    sizes = replace(SIZES, hidden=64, vocabulary=512)  # so that a CPU too takes all clients at once, as a GPU does
    with work(replace(sizes, clients=2) if quick else sizes) as given:
        loop = peers.PeftLoop(given, foreach=True)
        apart = same(loop.round(), cohort(given), given)
        steps = sum(map(len, given.steps))
        ours, theirs = (sum(count(side).values()) / steps for side in (lambda: cohort(given), loop.round))
    return Result(
        name="cohort-ops",
        what=f"non-view ATen operations per client-step, {sizes.layers} layers, {len(given.jobs)} clients",
        clock="ops",
        ratios={PEER: theirs / ours},
        targets={PEER: 12.0},
        pairs=({OURS: ours, PEER: theirs},),
        equal={"‖difference‖ / ‖update‖": apart},
        notes=(f"{ours:.1f} of ours, {theirs:.1f} of PEFT's per client-step",),
    )


def count(side: Callable[[], Any]) -> Counter[str]:
    """{operation: how often} of one call."""
    counter = Count()
    with counter:
        side()
    return counter.found
