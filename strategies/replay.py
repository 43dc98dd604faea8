"""Experience replay: every client trains some of what it trained in earlier stages once more.

Chaudhry et al., "On Tiny Episodic Memories in Continual Learning", 2019, arXiv 1902.10486; the reservoir is Vitter's,
"Random Sampling with a Reservoir", ACM TOMS 1985. Uses task identity: no.

A client's reservoir holds at most `budget` of all examples that it was ever given, each with the same chance. Every
example has a random key, a function of the client's seed and its row alone, and those with the smallest keys stay: so
one that is seen in several rounds counts once, and the order in which examples come does not matter. In a round that
brings n examples, ratio · n of the reservoir's others, as far as there are, are drawn without replacement and trained
with them. The reservoir names rows of the client's own data; it lies in the client's memory, and neither an example
nor its name reaches the server. The server averages as `finetune` does, by the examples that are new.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedstrata.core.config import StrategyConfig, require
from fedstrata.core.seeds import generator
from fedstrata.strategies.base import Offer, Row, Selector
from fedstrata.strategies.facts import Facts
from fedstrata.strategies.finetune import Finetune, FinetuneConfig

RESERVOIR = "reservoir"


@dataclass(frozen=True)
class ReplayConfig(FinetuneConfig):
    """Options of experience replay."""

    name: str = "replay"
    budget: int = 100  # most examples in a client's reservoir; 0 is finetune
    ratio: float = 0.5  # replayed examples per new one

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.budget >= 0, "strategy.budget", "at least 0", self.budget)
        good = 0 <= self.ratio < float("inf")
        require(good, "strategy.ratio", "a finite number of at least 0", self.ratio)


class Reservoir(Selector):
    """The present share and a draw from what the reservoir holds beside it."""

    def select(self, offer: Offer) -> tuple[Sequence[Row], Mapping[str, npt.NDArray[Any]]]:
        if not self.options.budget:
            return offer.rows, {}
        held = [(int(task), int(row)) for task, row in offer.memory.get(RESERVOIR, ())]
        present = set(offer.rows)
        past = [row for row in held if row not in present]
        count = min(len(past), round(self.options.ratio * len(offer.rows)))
        drawn = generator(offer.draw, "replay").permutation(len(past))[:count].tolist()
        kept = reservoir({*held, *present}, self.options.budget, offer.seed)
        return [*offer.rows, *(past[place] for place in sorted(drawn))], {RESERVOIR: np.array(kept, dtype=np.int64)}


class Replay(Finetune):
    """FedAvg on one LoRA whose clients rehearse examples of earlier stages from a reservoir of their own."""

    facts: ClassVar[Facts] = Facts("1902.10486", "arXiv 2019", rehearsal=True, plain={}, neutral={"budget": 0})
    config_type: ClassVar[type[StrategyConfig]] = ReplayConfig
    selector: ClassVar[type[Selector]] = Reservoir

    def rehearsed(self, stage: int, samples: int) -> int:
        """Of a client that was given enough of them."""
        return min(self.options.budget, round(self.options.ratio * samples)) if stage > 1 else 0


def reservoir(rows: Iterable[Row], budget: int, seed: int) -> list[Row]:
    """The `budget` distinct rows with the smallest keys, sorted; all of them where they are no more.

    As keys are independent of what else there is, what stays of a union is what stays of (what stayed, the new ones).
    """
    names = sorted(set(rows))
    keys: dict[int, npt.NDArray[np.float64]] = {}
    for task, last in dict(names).items():  # names are sorted, so the last row of a task is its largest
        keys[task] = generator(seed, "reservoir", task).random(last + 1)
    return sorted(sorted(names, key=lambda name: keys[name[0]][name[1]])[:budget])
