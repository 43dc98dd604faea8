"""A round of 100 clients at TinyLlama-1.1B's shape on one GPU."""

from fedstrata.benchmarks.gpu_cases import Case, compare
from fedstrata.benchmarks.gpu_parts import SEVEN, TINYLLAMA, Load
from fedstrata.benchmarks.measure import Result

# 16 instructions of 300 tokens each: what pfl-research's benchmark of this shape has on average
CASE = Case("gpu-round", TINYLLAMA, Load(100, 16, 4, 300), SEVEN, False, None, "round", 8e6, repeats=3)


def bench(quick: bool = False) -> Result:
    """Seconds of a round, and those of a PEFT loop over ours."""
    return compare(CASE, quick)
