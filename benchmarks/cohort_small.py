"""Local training where computing costs more than dispatching: one cohort of 16 against the ways of the peers."""

from dataclasses import replace

from fedstrata.benchmarks.cohorts import Sizes
from fedstrata.benchmarks.measure import Result
from fedstrata.benchmarks.sides import ONEDNN, PEFT, PFL, compare
from fedstrata.core import kernels

SIZES = Sizes(hidden=256, layers=4, vocabulary=4096, length=64, answer=16, batch=4, rows=8)
TARGETS = {PEFT: 2.2, PFL: 1.8}


def bench(quick: bool = False) -> Result:
    """CPU seconds of one client-round of two steps."""
    sizes = replace(SIZES, hidden=192, layers=1, vocabulary=512, rows=4, clients=2) if quick else SIZES
    what = f"local training, hidden {sizes.hidden}, {sizes.layers} layers, batch 4 × 64 tokens, {sizes.clients} clients"
    exact = kernels.error() <= kernels.MOST
    others = (PEFT, PFL, ONEDNN) if exact else (PEFT, PFL)
    return compare("cohort-small", what, sizes, TARGETS, others, 1 if quick else 5)
