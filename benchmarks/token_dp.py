"""`bench token-dp`: do noised identity tokens still find their subspaces on fcit-mini, and at what epsilon?

Eight tasks, each with two clients of n instructions of its own (disjoint rows of the task's train split). Tokens are
made by the client's own code with the tiny base's encoder and its own bound, and placed by DISCO's own rule, stage
after stage: a task is kept when its first client opens a subspace and its second client joins that one and no other.
Noise is for replacing one instruction: its standard deviation is z · 2 · clip / n.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from fedstrata import scenarios
from fedstrata.benchmarks.measure import Result
from fedstrata.client.identity import identify
from fedstrata.client.model import BaseModel
from fedstrata.client.release import release
from fedstrata.client.world import base_of
from fedstrata.core.config import RunConfig
from fedstrata.core.identity import Token, cosine, cosines
from fedstrata.core.privacy import epsilon
from fedstrata.core.seeds import generator
from fedstrata.scenarios.stream import Example, Scenario, Task
from fedstrata.server import configure
from fedstrata.strategies.disco import DiscoConfig
from fedstrata.strategies.organisation import match, place

DELTA = 1e-5
CASES = ((200, 1.0), (200, 0.5), (200, 2.0), (100, 1.0), (50, 1.0), (20, 1.0), (10, 1.0), (10, 0.0))  # (n, z)
AIMED = (200, 1.0)
SEEDS = 20


@dataclass(frozen=True)
class Trial:
    """What one drawing of clients and noise came to.

    Attributes:
        kept: tasks whose two clients share a subspace that is theirs alone.
        matched: tasks whose noised token is nearest to, and within τ of, the plain token of the task's other client.
        near: mean cosine between a noised token and the same client's plain one.
        routed: percentage of test instructions whose nearest noised token is their task's.
    """

    kept: int
    matched: int
    near: float
    routed: float


def bench(quick: bool = False) -> Result:
    """Tasks lost of eight, the worst of all seeds, by n and z."""
    config = configure.resolve("fcit-mini", [])
    base, scenario = base_of(config), scenarios.of(config)
    cases, seeds = ((AIMED, (10, 1.0)), 2) if quick else (CASES, SEEDS)
    found = {case: [trial(base, scenario, config, *case, seed) for seed in range(seeds)] for case in cases}
    plain = _plain_is_plain(base, scenario, config)
    tasks = len(scenario.tasks)
    return Result(
        name="token-dp",
        what=f"tasks of {tasks} whose clients do not find their subspace, worst of {seeds} seeds; fcit-mini, tiny base",
        clock="tasks",
        ratios={},
        targets={_label("tasks lost", AIMED): 0},
        limits={_label("tasks lost", case): tasks - min(t.kept for t in trials) for case, trials in found.items()},
        pairs=tuple(_row(case, trials) for case, trials in found.items()),
        equal={"token_noise=0 against the plain token": plain},
        notes=(
            f"one release at δ = {DELTA:g}; τ {base.encoder.tau}, clip {base.encoder.norm:.3f}, D {base.encoder.dim}",
            "replacing one instruction: standard deviation z · 2 · clip / n; with one made zero, z counts double",
            *(_told(case, trials, tasks) for case, trials in found.items()),
        ),
    )


def trial(base: BaseModel, scenario: Scenario, config: RunConfig, count: int, z: float, seed: int) -> Trial:
    """Two clients of `count` instructions for every task, their tokens noised with multiplier z."""
    tau, tasks = base.encoder.tau, scenario.tasks
    noisy = replace(config, seed=seed, strategy=DiscoConfig(token_noise=z, token_delta=DELTA))
    hands = [_hands(task, count, seed) for task in tasks]
    plain = [[identify(base, hand) for hand in pair] for pair in hands]
    told = [
        [release(base, hand, noisy, str(seed).encode(), f"{task.name}:{client}") for client, hand in enumerate(pair)]
        for task, pair in zip(tasks, hands, strict=True)
    ]
    others = np.stack([second.value for _, second in plain])
    matched = sum(match(first.value, others, tau) == number for number, (first, _) in enumerate(told))
    near = fmean(cosine(a.value, b.value) for x, y in zip(plain, told, strict=True) for a, b in zip(x, y, strict=True))
    return Trial(kept(told, tau), matched, near, routed(base, scenario, [first for first, _ in told]))


def kept(told: Sequence[Sequence[Token]], tau: float) -> int:
    """How many tasks keep a subspace of their own; the clients of a task come in two rounds of its stage."""
    cache: list[Token] = []
    homes: list[list[int | None]] = []
    for clients in told:
        homes.append([])
        for token in clients:
            tokens = np.stack([t.value for t in cache]) if cache else np.zeros((0, 0), dtype=np.float32)
            (home,) = place([token], tokens, tau, DiscoConfig().min_open)
            homes[-1].append(home)
            if home == len(cache):
                cache.append(token)
    found = [home[0] for home in homes if None not in home and len(set(home)) == 1]
    return sum([home for pair in homes for home in set(pair)].count(home) == 1 for home in found)


def routed(base: BaseModel, scenario: Scenario, tokens: Sequence[Token]) -> float:
    """Percentage of test instructions that are nearest to their own task's token."""
    columns = np.stack([token.value for token in tokens])
    shares = [
        float((cosines(base.encoder.encode([row.question for row in task.test]), columns).argmax(1) == number).mean())
        for number, task in enumerate(scenario.tasks)
    ]
    return 100 * fmean(shares)


def _hands(task: Task, count: int, seed: int) -> tuple[list[Example], list[Example]]:
    """What two clients hold of a task: drawn rows, none of them twice."""
    rows = generator(seed, "token-dp", task.name).permutation(len(task.train))[: 2 * count]
    examples = [task.train[int(row)] for row in rows]
    return examples[:count], examples[count:]


def _plain_is_plain(base: BaseModel, scenario: Scenario, config: RunConfig) -> str:
    examples = list(scenario.tasks[0].train[:50])
    told = release(base, examples, replace(config, strategy=DiscoConfig()), b"", "")
    assert told.value.tobytes() == identify(base, examples).value.tobytes(), "a token without noise is another one"
    return "bit for bit"


def _label(what: str, case: tuple[int, float]) -> str:
    return f"{what}, n = {case[0]}, z = {case[1]:g}"


def _row(case: tuple[int, float], trials: Sequence[Trial]) -> dict[str, Any]:
    cost = epsilon(case[1], 1, DELTA) if case[1] else None
    return {"n": case[0], "z": case[1], "epsilon": cost, **{k: [vars(t)[k] for t in trials] for k in vars(trials[0])}}


def _told(case: tuple[int, float], trials: Sequence[Trial], tasks: int) -> str:
    cost = f"ε {epsilon(case[1], 1, DELTA):.3g}" if case[1] else "no noise"
    low, mean = min(t.kept for t in trials), fmean(t.kept for t in trials)
    return (
        f"n = {case[0]}, z = {case[1]:g} ({cost}): kept {mean:.2f} of {tasks} (least {low}), matched to plain tokens "
        f"{fmean(t.matched for t in trials):.2f} (least {min(t.matched for t in trials)}), cosine to the plain token "
        f"{fmean(t.near for t in trials):.3f}, test instructions routed home {fmean(t.routed for t in trials):.1f} %"
    )
