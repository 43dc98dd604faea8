"""FedProx: every client is held near the adapter that the round began with.

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, arXiv 1812.06127. Uses task identity: no.

The client minimises its loss + (μ/2) ‖θ − θ^t‖², the norm squared; the server averages as `finetune` does.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fedstrata.core.config import StrategyConfig, require
from fedstrata.strategies.base import LocalHalf
from fedstrata.strategies.facts import Facts
from fedstrata.strategies.finetune import Finetune, FinetuneConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FedProxConfig(FinetuneConfig):
    """Options of FedProx."""

    name: str = "fedprox"
    mu: float = 0.01  # μ, how firmly; 0 is finetune

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.mu < float("inf"), "strategy.mu", "a finite number of at least 0", self.mu)


class Proximal(LocalHalf):
    """Adds the proximal term to every client's loss."""

    def loss(self, ctx: Any, batch: Any, out: Any, base_loss: "Tensor") -> "Tensor":
        penalty: Tensor = batch.part * proximal(ctx.values(), ctx.start, self.options.mu)
        return base_loss + penalty


class FedProx(Finetune):
    """FedAvg on one LoRA whose clients stay near the adapter that the round began with."""

    facts: ClassVar[Facts] = Facts("1812.06127", "MLSys 2020", plain={}, neutral={"mu": 0})
    config_type: ClassVar[type[StrategyConfig]] = FedProxConfig
    local_half: ClassVar[type[LocalHalf]] = Proximal


def proximal(values: "Tensor", start: "Tensor", mu: float) -> "Tensor":
    """(μ/2) ‖θ − θ^t‖² of each row: [C, size] → [C]."""
    return 0.5 * mu * (values - start).square().sum(1)
