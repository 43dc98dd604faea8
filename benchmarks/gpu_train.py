"""Local training at LLaVA-1.5-7B's shape on one GPU, against the published recipe on the same card."""

from fedstrata.benchmarks.gpu_cases import Case, compare
from fedstrata.benchmarks.gpu_parts import FFN, LLAVA_7B, Load
from fedstrata.benchmarks.measure import Result

CASE = Case("gpu-train", LLAVA_7B, Load(7, 8, 4, 650), FFN, True, 1.4, "token", 1e6 / 14_000)


def bench(quick: bool = False) -> Result:
    """Wall seconds of the recipe over ours: a rank-8 subspace on the feed-forward layers, as DISCO has it."""
    return compare(CASE, quick)
