"""A method beside a baseline, seed by seed: data, partition and sampling are the same, so their luck cancels."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Paired:
    """Mean difference over n seeds, in points, and half the width of its 95 % confidence interval (None for one)."""

    mean: float
    half: float | None
    n: int

    def text(self) -> str:
        """With its interval.

        >>> Paired(2.0, 4.97, 3).text()
        '+2.0 [-3.0, +7.0]'
        """
        interval = "" if self.half is None else f" [{self.mean - self.half:+.1f}, {self.mean + self.half:+.1f}]"
        return f"{self.mean:+.1f}{interval}"


def paired(values: Mapping[int, float | None], baseline: Mapping[int, float | None]) -> Paired | None:
    """Over the seeds that both have: d̄ ± t(0.975, n − 1) · s / √n, s the sample standard deviation of differences.

    None without a common seed. It takes differences of seeds to be normal; with three seeds t is 4.3.
    """
    pairs = [(value, baseline.get(seed)) for seed, value in values.items()]
    found = [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]
    if not found:
        return None
    if len(found) == 1:
        return Paired(found[0], None, 1)
    t = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(found) - 1))
    return Paired(statistics.fmean(found), t * statistics.stdev(found) / math.sqrt(len(found)), len(found))
