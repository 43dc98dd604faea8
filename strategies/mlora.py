"""M-LoRA: every stage trains a LoRA of its own from scratch; what answers is their mean. Inspired by a row of a table.

Guo et al., "Federated Continual Instruction Tuning", ICCV 2025, arXiv 2503.12897, names the baseline; no source that
could be read defines it, and this is the plainest method of that name. Uses task identity: no.

The mean is taken of what the adapters do, (1/T) Σ B_t A_t, by concatenating their ranks with B divided by T: stages
draw their A apart, so a mean of factors would hold T² products, of which T were ever trained. Stages count alike,
whatever their samples. Nothing travels but the present stage's adapter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedstrata.core.adapters import Flat, Layout
from fedstrata.core.config import StrategyConfig
from fedstrata.strategies.facts import Facts
from fedstrata.strategies.merging import MergeConfig
from fedstrata.strategies.staged import Staged, joined


@dataclass(frozen=True)
class MLoraConfig(MergeConfig):
    """M-LoRA has no options of its own."""

    name: str = "mlora"


class MLora(Staged):
    """A LoRA for every stage, trained apart; their mean answers (inspired by a row of FCIT's table)."""

    facts: ClassVar[Facts] = Facts("2503.12897", "ICCV 2025", grows=1, plain={"subspaces": 1}, one_stage=True)
    config_type: ClassVar[type[StrategyConfig]] = MLoraConfig

    def rank_after(self, stage: int) -> int:
        return max(1, stage) * self.setup.rank

    def merged(self, adapters: Sequence[Flat]) -> Flat:
        return mean(adapters, self.setup.layout)


def mean(adapters: Sequence[Flat], layout: Layout) -> Flat:
    """(1/T) Σ B_t A_t as one adapter of concatenated ranks, of adapters without a tail; one comes out as it is."""
    views, share = [layout.lora.split(flat) for flat in adapters], np.float32(1 / len(adapters))
    return joined(layout, *[layout.join({n: (a, b * share) for n, (a, b) in view.items()}) for view in views])
