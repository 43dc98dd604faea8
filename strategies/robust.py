"""FedMedian, trimmed mean, multi-Krum, geometric median: one global adapter, merged so that some clients may lie.

Yin et al., ICML 2018, arXiv 1803.01498; Blanchard et al., NeurIPS 2017, arXiv 1703.02757; Pillutla et al., IEEE TSP
2022, arXiv 1912.13445. Uses task identity: no. They are `finetune` with `merge` set; every other method takes the same
option. The arithmetic is in `rules`.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedstrata.core.config import StrategyConfig
from fedstrata.strategies.facts import Facts
from fedstrata.strategies.finetune import Finetune, FinetuneConfig


@dataclass(frozen=True)
class RuleConfig(FinetuneConfig):
    """Options of every method here: those of finetune, the rule given by the name."""

    named_for: ClassVar[str] = "merge"


@dataclass(frozen=True)
class FedMedianConfig(RuleConfig):
    """Options of FedMedian."""

    name: str = "fedmedian"
    merge: str = "median"


class FedMedian(Finetune):
    """One LoRA, every parameter the median of the clients' values."""

    facts: ClassVar[Facts] = Facts("1803.01498", "ICML 2018", splits=False)
    config_type: ClassVar[type[StrategyConfig]] = FedMedianConfig


@dataclass(frozen=True)
class FedTrimmedConfig(RuleConfig):
    """Options of the trimmed mean."""

    name: str = "fedtrimmed"
    merge: str = "trimmed"


class FedTrimmed(Finetune):
    """One LoRA, every parameter the mean without the most extreme of the clients' values."""

    facts: ClassVar[Facts] = Facts("1803.01498", "ICML 2018", splits=False)
    config_type: ClassVar[type[StrategyConfig]] = FedTrimmedConfig


@dataclass(frozen=True)
class MultiKrumConfig(RuleConfig):
    """Options of multi-Krum."""

    name: str = "multikrum"
    merge: str = "multikrum"


class MultiKrum(Finetune):
    """One LoRA, the mean of the updates that lie nearest to one another."""

    facts: ClassVar[Facts] = Facts("1703.02757", "NeurIPS 2017", splits=False)
    config_type: ClassVar[type[StrategyConfig]] = MultiKrumConfig


@dataclass(frozen=True)
class GeomedianConfig(RuleConfig):
    """Options of the geometric median."""

    name: str = "geomedian"
    merge: str = "geomedian"


class Geomedian(Finetune):
    """One LoRA, the point with the smallest sum of distances to the clients' adapters."""

    facts: ClassVar[Facts] = Facts("1912.13445", "IEEE TSP 2022")
    config_type: ClassVar[type[StrategyConfig]] = GeomedianConfig
