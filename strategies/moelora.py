"""MoELoRA: one LoRA cut into experts that a gate weighs for every token.

Chen et al., "CoIN: A Benchmark of Continual Instruction tuNing for Multimodal Large Language Models", NeurIPS 2024,
arXiv 2403.08350. Uses task identity: no.

Each adapted layer answers Wx + γ Σ_e g_e(x) B_e A_e x with g(x) = softmax(G x) over its E experts, which share the rank
that `finetune`'s adapter has. The gate G is trained with them, averaged with them and sent with them: in · E parameters
more a layer. It is 0 at the start, where the paper draws it: all experts then weigh 1/E, and differ by their A. The
server averages as `finetune` does. With one expert there is no gate, and the method is `finetune`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from fedstrata.core.adapters import GATE, Layout
from fedstrata.core.config import StrategyConfig, require
from fedstrata.strategies.base import Setup
from fedstrata.strategies.facts import Facts
from fedstrata.strategies.finetune import Finetune, FinetuneConfig


@dataclass(frozen=True)
class MoELoraConfig(FinetuneConfig):
    """Options of MoELoRA."""

    in_factors: ClassVar[bool] = True  # an expert is a slice of the factors' rank

    name: str = "moelora"
    experts: int = 4  # E; they share the rank subspaces · lora.rank evenly; 1 is finetune

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.experts >= 1, "strategy.experts", "at least 1", self.experts)

    def trains(self, lora: Layout, hidden: int, features: Callable[[], int]) -> Layout:
        """The same layers with their gates [E, in] behind the factors."""
        require(lora.kind == "lora", "lora.kind", f"lora or rslora with strategy.name={self.name}", lora.kind)
        gates = tuple((f"{name}.{GATE}", (self.experts, inner)) for name, _, inner in lora.modules)
        return replace(lora, kind="moelora", own=gates) if self.experts > 1 else lora


class MoELora(Finetune):
    """FedAvg on one LoRA whose ranks are experts, weighed token by token."""

    facts: ClassVar[Facts] = Facts("2403.08350", "NeurIPS 2024", plain={}, neutral={"experts": 1})
    config_type: ClassVar[type[StrategyConfig]] = MoELoraConfig

    def __init__(self, options: MoELoraConfig, setup: Setup) -> None:
        super().__init__(options, setup)
        rule = f"a divisor of the adapter's rank, {self.adapter_rank}"
        require(self.adapter_rank % options.experts == 0, "strategy.experts", rule, options.experts)
