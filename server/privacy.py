"""Which clients hold too few instructions for a token, and what tokens and updates have cost in epsilon so far."""

from collections.abc import Mapping
from typing import Any

from fedstrata.core.config import RunConfig
from fedstrata.core.privacy import epsilon, token_options
from fedstrata.scenarios.stream import Scenario
from fedstrata.server.progress import Progress
from fedstrata.strategies import find


def least(config: RunConfig) -> int:
    """The fewest instructions that a client takes part with: `strategy.token_min_samples`, 1 where no token is sent."""
    needed = find(config.strategy.name).needs_tokens
    return token_options(config.strategy).token_min_samples if needed else 1


def too_few(config: RunConfig, scenario: Scenario, stage: int, round_: int) -> list[int]:
    """The clients that have data in this round, but fewer instructions than a token needs.

    Where a client's place among the participants decides what it trains, nobody knows before the draw: none.
    """
    limit = least(config)
    if limit == 1 or scenario.assign is not None:
        return []
    held = {c: scenario.tasks_of(stage, round_, 0, c) for c in scenario.present(stage, round_)}
    return [c for c, tasks in held.items() if scenario.share_size(tasks, c, stage, round_) < limit]


def epsilons(config: RunConfig, progress: Progress) -> dict[str, float | None]:
    """The largest ε of any client so far; None where no noise is added."""
    tokens, section = token_options(config.strategy), config.federation
    asked = find(config.strategy.name).needs_tokens
    return {
        "epsilon_token": _most(tokens.token_noise if asked else 0.0, progress.tokens_sent, tokens.token_delta),
        "epsilon_update": _most(section.update_noise, progress.updates_sent, section.update_delta),
    }


def _most(noise: float, sent: Mapping[int, int], delta: float) -> float | None:
    return epsilon(noise, max(sent.values(), default=0), delta) if noise else None


def lines(summary: Mapping[str, Any]) -> list[str]:
    """What a run's summary says of privacy, for people; nothing where nothing was asked for."""
    costs = {what: summary.get(f"epsilon_{what}") for what in ("token", "update")}
    told = [f"epsilon of a client's {what}s, at most {cost:.3g}" for what, cost in costs.items() if cost is not None]
    few = ", ".join(map(str, summary.get("too_few") or ()))
    return [*told, *([f"too few instructions for a token: clients {few}"] if few else [])]
