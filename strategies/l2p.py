"""L2P: a pool of prompts, of which every input gets those whose keys are nearest to it; the base answers behind them.

Wang et al., "Learning to Prompt for Continual Learning", CVPR 2022, arXiv 2112.08654. Uses task identity: no.

There is no LoRA: `prompts` trained embeddings groups of `length` tokens each and one key per group. An input's query is
the frozen feature of its question by the text encoder; the `top` keys with the largest cosine choose its prompts, which
stand before the instruction, in the order of the pool, in training as in use. The client minimises its loss −
λ Σ cos(query, chosen keys), in a mean over its answers; prompts that nobody chose get no gradient. The server averages
prompts and keys as `finetune` does. Different from the paper, which classifies pictures: the base's own head answers,
the query is the text's, and prompts are chosen for each input, not by a majority of its batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fedstrata.core.config import StrategyConfig, require
from fedstrata.core.records import Knowledge
from fedstrata.strategies.base import LocalHalf
from fedstrata.strategies.facts import Facts
from fedstrata.strategies.finetune import Finetune
from fedstrata.strategies.prompting import (
    KEYS,
    PROMPTS,
    PromptConfig,
    Prompted,
    apart,
    chosen,
    nearest,
    prompts_known,
    similar,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class L2PConfig(PromptConfig):
    """Options of L2P."""

    name: str = "l2p"
    prompts: int = 10  # in the pool

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.prompts >= 1, "strategy.prompts", "at least 1", self.prompts)
        rule = f"between 1 and strategy.prompts ({self.prompts})"
        require(self.top <= self.prompts, "strategy.top", rule, self.top)


class Pulled(LocalHalf):
    """Puts the chosen prompts before the inputs and pulls their keys to them."""

    def features(self, base: Any, examples: Sequence[Any]) -> "Tensor":
        found: Tensor = base.encode(examples)
        return found

    def batch(self, ctx: Any, batch: Any) -> Any:
        self.near = similar(batch.queries, ctx.per_row(KEYS, batch))
        self.picks = nearest(self.near, self.options.top)
        return ctx.before(batch, chosen(ctx.per_row(PROMPTS, batch), self.picks))

    def loss(self, ctx: Any, batch: Any, out: Any, base_loss: "Tensor") -> "Tensor":
        pull = self.options.strength * self.near.gather(1, self.picks).sum(1)
        total: Tensor = batch.added(base_loss, -pull[batch.line])
        return total


class L2P(Prompted, Finetune):
    """FedAvg on a pool of prompts that inputs choose from by keys (learning to prompt)."""

    facts: ClassVar[Facts] = Facts("2112.08654", "CVPR 2022", encoder=True)
    config_type: ClassVar[type[StrategyConfig]] = L2PConfig
    local_half: ClassVar[type[LocalHalf]] = Pulled
    routes: ClassVar[bool] = False  # no prompt is any task's own

    @property
    def adapter_rank(self) -> int:
        return int(self.options.prompts)

    def rank_after(self, stage: int) -> int:
        return 1

    def knowledge(self) -> Knowledge:
        """Every prompt with its key is an adapter of its own."""
        layout = self.setup.layout
        return prompts_known(layout, apart(layout, self.state.adapter), self.options.top)
