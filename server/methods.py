"""What every method of the catalogue is, needs and costs: the table of `fedstrata list strategies` and of the README.

Costs are those of the embedded base with the default scenario's sizes, and are computed from what each method tells
the plan of a run; the base's layers are read off the header of its weight file, so nothing here opens torch.
"""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from safetensors import safe_open

from fedstrata.core import shapes
from fedstrata.core.adapters import Layout
from fedstrata.core.config import LoraSection, RunConfig, StrategyConfig
from fedstrata.server import configure
from fedstrata.strategies import STRATEGIES
from fedstrata.strategies.base import Setup, Strategy

TASKS = 8  # of fcit-mini, one a stage
COLUMNS = ("strategy", "what it is", "published", "needs", "parameters per task", "upload per client-round")


@dataclass(frozen=True)
class Method:
    """One row: `grows` parameters that one more task adds to the state, `upload` bytes of one client in one round.

    An identity token comes on top: it is sent once per client and stage, and kept once per subspace.
    """

    name: str
    about: str
    published: str
    needs: str
    grows: int
    upload: float

    def cells(self) -> tuple[str, ...]:
        """The row as words, in the order of `COLUMNS`."""
        from fedstrata.server.report import human_bytes

        grows = f"{self.grows:,}" if self.grows else "–"
        return self.name, self.about, self.published, self.needs, grows, human_bytes(self.upload)


def methods() -> list[Method]:
    """The whole catalogue, in its order."""
    config = configure.resolve("", [])
    return [method(name, kind, config) for name, kind in STRATEGIES.items()]


def method(name: str, kind: type[Strategy], config: RunConfig) -> Method:
    """One method of the catalogue, with the options that it has by itself; `config` gives the sizes."""
    options, facts = kind.config_type(), kind.facts
    strategy = kind(options, _setup(options, config))
    about = (inspect.getdoc(kind) or "").partition("\n")[0]
    paper = f"[{facts.paper}](https://arxiv.org/abs/{facts.paper}), {facts.venue}" if facts.paper else "–"
    grows = facts.grows * strategy.setup.layout.lora.size(strategy.adapter_rank)
    rounds = range(1, config.federation.rounds_per_stage + 1)
    upload = sum(upload_bytes(strategy, 2, round_) for round_ in rounds) / len(rounds)
    return Method(name, about, paper, needs(kind), grows, upload)


def needs(kind: type[Strategy]) -> str:
    """What a method asks of its surroundings."""
    asked = {
        "all tasks at once": kind.pooled,
        "task identity": kind.uses_task_identity,
        "text encoder": kind.needs_tokens or kind.facts.encoder,
        "rehearsal": kind.facts.rehearsal,
    }
    return ", ".join(what for what, wanted in asked.items() if wanted) or "–"


def upload_bytes(strategy: Strategy, stage: int, round_: int) -> int:
    """Raw bytes that one client sends in one round, its identity token not counted."""
    beside, _ = strategy.beside(stage, round_)
    return 4 * (strategy.setup.layout.size(strategy.adapter_rank) + beside)


def markdown(rows: Iterable[Method]) -> str:
    """The README's table."""
    body = [(f"`{row.name}`", *row.cells()[1:]) for row in rows]
    lines = [COLUMNS, ("---", "---", "---", "---", "--:", "--:"), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _setup(options: StrategyConfig, config: RunConfig) -> Setup:
    sizes, dim = config.federation, shapes.token_dim(config)  # of the embedded base the language model's width, too
    layout = options.trains(embedded(), dim, lambda: shapes.token_dim(replace(config, strategy=options)))
    return Setup(0, layout, config.lora.rank, TASKS, 0.9, 0.05, clients=sizes.clients, rounds=sizes.rounds_per_stage)


@lru_cache(maxsize=1)
def embedded() -> Layout:
    """The embedded base's layers that are adapted by default."""
    targets = tuple(f".{target}.weight" for target in LoraSection().targets)
    with safe_open(shapes.embedded() / "model.safetensors", framework="numpy") as file:
        names = sorted(key for key in file.keys() if key.endswith(targets) and shapes.TOWER not in key)  # noqa: SIM118
        sizes = {name: file.get_slice(name).get_shape() for name in names}
    return Layout(tuple((name.removesuffix(".weight"), size[0], size[1]) for name, size in sizes.items()))
