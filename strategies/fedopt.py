"""FedAvgM, FedAdagrad, FedAdam, FedYogi: one global adapter that the server moves by an optimiser of its own.

Hsu et al. 2019, arXiv 1909.06335; Reddi et al., "Adaptive Federated Optimization", ICLR 2021, arXiv 2003.00295. Uses
task identity: no. They are `finetune` with `server_optimizer` set; every other method takes the same option. The
arithmetic is in `optimizers`.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedstrata.core.config import StrategyConfig
from fedstrata.strategies.facts import Facts
from fedstrata.strategies.finetune import Finetune, FinetuneConfig

REDDI = Facts("2003.00295", "ICLR 2021")


@dataclass(frozen=True)
class OptimizerConfig(FinetuneConfig):
    """Options of every method here: those of finetune, the optimiser given by the name."""

    named_for: ClassVar[str] = "server_optimizer"


@dataclass(frozen=True)
class FedAvgMConfig(OptimizerConfig):
    """Options of FedAvgM."""

    name: str = "fedavgm"
    server_optimizer: str = "fedavgm"


class FedAvgM(Finetune):
    """FedAvg on one LoRA whose mean updates gather momentum on the server."""

    facts: ClassVar[Facts] = Facts("1909.06335", "2019")
    config_type: ClassVar[type[StrategyConfig]] = FedAvgMConfig


@dataclass(frozen=True)
class FedAdagradConfig(OptimizerConfig):
    """Options of FedAdagrad."""

    name: str = "fedadagrad"
    server_optimizer: str = "fedadagrad"


class FedAdagrad(Finetune):
    """FedAvg on one LoRA that the server moves by Adagrad along the mean update."""

    facts: ClassVar[Facts] = REDDI
    config_type: ClassVar[type[StrategyConfig]] = FedAdagradConfig


@dataclass(frozen=True)
class FedAdamConfig(OptimizerConfig):
    """Options of FedAdam."""

    name: str = "fedadam"
    server_optimizer: str = "fedadam"


class FedAdam(Finetune):
    """FedAvg on one LoRA that the server moves by Adam along the mean update."""

    facts: ClassVar[Facts] = REDDI
    config_type: ClassVar[type[StrategyConfig]] = FedAdamConfig


@dataclass(frozen=True)
class FedYogiConfig(OptimizerConfig):
    """Options of FedYogi."""

    name: str = "fedyogi"
    server_optimizer: str = "fedyogi"


class FedYogi(Finetune):
    """FedAvg on one LoRA that the server moves by Yogi along the mean update."""

    facts: ClassVar[Facts] = REDDI
    config_type: ClassVar[type[StrategyConfig]] = FedYogiConfig
