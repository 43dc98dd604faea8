"""Local training where dispatching costs more than computing: one cohort of 16 against the ways of the peers."""

from dataclasses import replace

from fedstrata.benchmarks.cohorts import Sizes
from fedstrata.benchmarks.measure import Result
from fedstrata.benchmarks.sides import PEFT, PFL, TEMPLATE, TRAINER, compare

SIZES = Sizes(hidden=64, layers=2, vocabulary=512, length=32, answer=16, batch=2, rows=8)
TARGETS = {PEFT: 4.0, TRAINER: 40.0, TEMPLATE: 40.0, PFL: 3.0}


def bench(quick: bool = False) -> Result:
    """CPU seconds of one client-round of four steps."""
    sizes = replace(SIZES, rows=4, clients=2) if quick else SIZES
    what = f"local training, hidden 64, 2 layers, batch 2 × 32 tokens, {sizes.clients} clients, rank 8 on all Linears"
    return compare("cohort-tiny", what, sizes, TARGETS, (PEFT, TRAINER, TEMPLATE, PFL), 1 if quick else 7)
