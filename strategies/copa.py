"""CoPA-Merging (RobustMerge): every stage trains a LoRA of its own; at its end all of them are merged without training.

Zeng et al., "RobustMerge: Parameter-Efficient Model Merging for MLLMs with Direction Robustness", NeurIPS 2025, arXiv
2502.17159 (first called CoPA-Merging). Uses task identity: no.

Per layer and stage n: Ã_n and B̃_n keep the largest entries of A_n and B_n; S_n,i = Σ_j |A_n,ij| / Σ_j |Ã_n,ij| makes up
for what pruning took from the i-th direction, most where little is left, which are the small singular directions that
interference turns first; S̃_n,i = S_n,i / Σ_m S_m,i sets the stages off against each other; what answers is
ΔW = λ (Σ_n B̃_n diag(S̃_n)) (Σ_n Ã_n). Sums of factors make cross products, so this is a rule for the end of a stage;
within it updates are averaged as in `finetune`. The published code differs from the paper: it doubles both factors
(λ = 4) and lifts S to its own 80th percentile (`clamp` 0.2), which flattens it. It divides by 0 where all of a
direction is pruned; here such a direction takes no part. One adapter alone answers as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fedstrata.core.adapters import Flat, Layout
from fedstrata.core.config import StrategyConfig, require
from fedstrata.strategies.facts import Facts
from fedstrata.strategies.merging import MergeConfig
from fedstrata.strategies.staged import Staged

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class CopaConfig(MergeConfig):
    """Options of CoPA-Merging."""

    name: str = "copa"
    lambda_: float = 2.0  # λ, the size of what is merged; N merges N stages to about their sum; paper 2, code 4
    keep: float = 0.2  # share of each factor's entries that is kept, the largest
    clamp: float = 0.0  # S is lifted to its (1 − clamp) quantile; 0: not (the paper), 0.2: as the published code

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.lambda_ < float("inf"), "strategy.lambda_", "a finite number above 0", self.lambda_)
        require(0 < self.keep <= 1, "strategy.keep", "above 0 and at most 1", self.keep)
        require(0 <= self.clamp <= 1, "strategy.clamp", "between 0 and 1", self.clamp)


class Copa(Staged):
    """A LoRA for every stage, trained apart; merged by pruning, complementary scaling and cross-task normalisation."""

    facts: ClassVar[Facts] = Facts("2502.17159", "NeurIPS 2025", grows=1, plain={"subspaces": 1}, one_stage=True)
    config_type: ClassVar[type[StrategyConfig]] = CopaConfig

    def merged(self, adapters: Sequence[Flat]) -> Flat:
        return adapters[0] if len(adapters) == 1 else robust_merge(adapters, self.setup.layout, self.options)


def robust_merge(adapters: Sequence[Flat], layout: Layout, options: CopaConfig) -> Flat:
    """One adapter of rank r out of N, layer by layer; they come without a tail."""
    views = [layout.lora.split(flat) for flat in adapters]
    merged = {}
    for name, _, _ in layout.modules:
        a, b = zip(*[view[name] for view in views], strict=True)
        merged[name] = merge([x.astype(np.float64) for x in a], [x.astype(np.float64) for x in b], options)
    return layout.join({name: (a.astype(np.float32), b.astype(np.float32)) for name, (a, b) in merged.items()})


def merge(a: Sequence[Matrix], b: Sequence[Matrix], options: CopaConfig) -> tuple[Matrix, Matrix]:
    """(A [r, in], B [out, r]) out of N factors of one layer."""
    small = [pruned(factor, options.keep) for factor in a]
    scales = np.stack([lifted(scaling(x, y), options.clamp) for x, y in zip(a, small, strict=True)])
    shares = normalised(scales)
    wide = sum(pruned(factor, options.keep) * share for factor, share in zip(b, shares, strict=True))
    return np.sum(small, axis=0), np.asarray(options.lambda_ * wide)


def pruned(factor: Matrix, keep: float) -> Matrix:
    """The factor with its largest entries, in absolute value and over the whole matrix; the others are 0."""
    size = np.abs(factor)
    number = max(1, round(keep * size.size))
    least = np.partition(size, size.size - number, axis=None)[size.size - number]
    return np.asarray(np.where(size >= least, factor, 0.0))


def scaling(a: Matrix, small: Matrix) -> Matrix:
    """S_i = Σ_j |A_ij| / Σ_j |Ã_ij| ≥ 1, [r]; 0 for a row of which nothing is left."""
    left = np.abs(small).sum(axis=1)
    return np.asarray(np.divide(np.abs(a).sum(axis=1), left, out=np.zeros(len(a)), where=left > 0))


def lifted(scales: Matrix, clamp: float) -> Matrix:
    """S, but at least its own (1 − clamp) quantile; a row of which nothing is left stays out."""
    if not clamp:
        return scales
    return np.asarray(np.where(scales > 0, np.maximum(scales, np.quantile(scales, 1 - clamp)), 0.0))


def normalised(scales: Matrix) -> Matrix:
    """S̃_n,i = S_n,i / Σ_m S_m,i for S [N, r]; 0 where all N are."""
    total = scales.sum(axis=0)
    return np.asarray(np.divide(scales, total, out=np.zeros_like(scales), where=total > 0))
