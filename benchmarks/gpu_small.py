"""A simulation's size on one GPU: hidden 256, 64 clients in a cohort."""

from fedstrata.benchmarks.gpu_cases import Case, compare
from fedstrata.benchmarks.gpu_parts import SEVEN, SMALL, Load
from fedstrata.benchmarks.measure import Result

CASE = Case("gpu-small", SMALL, Load(64, 32, 4, 64), SEVEN, False, 15.0, "client-step", 1e6 / 3_000)


def bench(quick: bool = False) -> Result:
    """Wall seconds of a PEFT loop over ours, and microseconds of a client-step."""
    return compare(CASE, quick)
