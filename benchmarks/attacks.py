"""`bench attacks`: how far hostile clients move what is merged, by attack, rule and subspaces.

A fifth of the clients are hostile and know all honest updates. Everything is measured in what an adapter does (B A):
error is the distance of the merged step to the honest mean step, in units of the latter; the honest spread is the
root mean square distance of single honest steps to their mean, in the same unit.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from fedstrata.benchmarks.measure import Result
from fedstrata.benchmarks.planted import CLIENTS, LAYOUT, RANK, Federation, Forge, honest, product
from fedstrata.core.adapters import Flat, fresh
from fedstrata.core.seeds import generator
from fedstrata.server.flower_private import become_server

SEEDS, VICTIM = 3, 0
FLIP, NOISE, FACTOR, ALIE, IPM = 5.0, 9.0, 1e6, 1.2, 0.5


@dataclass(frozen=True)
class Rule:
    """A way to merge: DISCO's option, and what the server does before."""

    merge: str = "mean"
    clip: bool = False
    gated: bool = True


RULES: Mapping[str, Rule] = {
    "mean, no gate": Rule(gated=False),
    "mean": Rule(),
    "mean, clip=median": Rule(clip=True),
    "median": Rule("median"),
    "trimmed": Rule("trimmed"),
    "multikrum": Rule("multikrum"),
    "geomedian": Rule("geomedian"),
    "product": Rule("product"),
    "product, clip=median": Rule("product", clip=True),
}


@dataclass(frozen=True)
class Case:
    """Who is where.

    Attributes:
        groups: subspaces.
        hostile: clients that attack.
        spread: of honest clients, `Federation.spread`.
        hijack: whether the hostile send the token of a subspace that is not theirs.
        fifth: whether at most a fifth of every subspace is hostile.
        quick: whether the quick bench looks at it.
    """

    groups: int
    hostile: tuple[int, ...]
    spread: float
    hijack: bool = False
    fifth: bool = True
    quick: bool = True


CASES: Mapping[str, Case] = {
    "one subspace, clients that differ": Case(1, (3, 8, 13, 18), 2.0, quick=False),
    "one subspace, clients that are alike": Case(1, (3, 8, 13, 18), 0.5),
    "four subspaces of five, one hostile client in each": Case(4, (16, 17, 18, 19), 0.5, quick=False),
    "four subspaces of five, three hostile clients in one": Case(4, (8, 12, 16), 0.5, fifth=False),
    "four subspaces of five, four clients of others come in by its token": Case(4, (17, 18, 19, 13), 0.5, True, False),
}


def flip(federation: Federation, client: int, start: Flat) -> Flat:
    return np.asarray(start - FLIP * federation.update(client), dtype=np.float32)


def noise(federation: Federation, client: int, start: Flat) -> Flat:
    """Just below the tenfold median norm from which on the gate refuses."""
    drawn = generator(federation.seed, "noise", client).normal(size=start.size)
    most = NOISE * np.median([np.linalg.norm(update) for update in others(federation, client)])
    return np.asarray(start + drawn * (most / np.linalg.norm(drawn)), dtype=np.float32)


def huge(federation: Federation, client: int, start: Flat) -> Flat:
    return np.asarray(start + FACTOR * federation.update(client), dtype=np.float32)


def nan(federation: Federation, client: int, start: Flat) -> Flat:
    flat = honest(federation, client, start)
    flat[-1] = np.nan
    return flat


def alie(federation: Federation, client: int, start: Flat) -> Flat:
    """A little is enough (Baruch et al. 2019, arXiv 1902.06156): mean − z · standard deviation, per parameter."""
    known = np.stack(others(federation, client))
    return np.asarray(start + known.mean(axis=0) - ALIE * known.std(axis=0), dtype=np.float32)


def ipm(federation: Federation, client: int, start: Flat) -> Flat:
    """Inner product manipulation (Xie et al. 2019, arXiv 1903.03936): −ε · mean."""
    return np.asarray(start - IPM * np.stack(others(federation, client)).mean(axis=0), dtype=np.float32)


def gauge(federation: Federation, client: int, start: Flat) -> Flat:
    """The honest adapter as (Q A, B Qᵀ): it does the same, and has the same norm."""
    flat, draw, factors = honest(federation, client, start), generator(federation.seed, "gauge", client), {}
    for name, (a, b) in LAYOUT.split(flat).items():
        q, _ = np.linalg.qr(draw.normal(size=(RANK, RANK)))
        factors[name] = ((q @ a).astype(np.float32), (b @ q.T).astype(np.float32))
    return LAYOUT.join(factors)


def others(federation: Federation, client: int) -> list[Flat]:
    """The honest updates of the subspace that a client's token leads to."""
    there = federation.members(federation.tokens.get(client, client % federation.groups))
    return [federation.update(member) for member in there if member not in federation.forge]


ATTACKS: Mapping[str, Forge] = {
    f"sign flip × {FLIP:g}": flip,
    f"noise, {NOISE:g} × the median norm": noise,
    "× 10⁶": huge,
    "NaN": nan,
    f"ALIE, z = {ALIE:g}": alie,
    f"IPM, ε = {IPM:g}": ipm,
    "gauge": gauge,
}
QUICK = ("none", f"sign flip × {FLIP:g}", "NaN", "gauge")
FIRST = "× 10⁶, in a subspace's first round"


def bench(quick: bool = False) -> Result:
    """The worst error where a fifth is hostile, in honest spreads; the whole grid as raw figures.

    quick: one seed, some attacks and cases.
    """
    become_server()
    every = {"none": honest, **ATTACKS, FIRST: huge}
    seeds, tried = (1, {name: every[name] for name in QUICK}) if quick else (SEEDS, every)
    chosen = {name: case for name, case in CASES.items() if not quick or case.quick}
    rows = [row for name, case in chosen.items() for row in grid(name, case, tried, seeds)]
    held = [row for row in rows if CASES[row["case"]].fifth and row["attack"] != "none"]
    worst = {rule: max(row["worst"] for row in held if row["rule"] == rule) for rule in RULES if RULES[rule].gated}
    gauges = max(row["error"] for row in held if row["attack"] == "gauge" and row["rule"] == "product")
    assert all(worst[rule] < 2 for rule in worst if RULES[rule].clip), "clip=median does not hold a fifth of hostiles"
    return Result(
        name="attacks",
        what=f"a fifth of {CLIENTS} planted clients is hostile: error of the merged step, worst of {seeds} seeds",
        clock="honest spreads",
        ratios={},
        targets={"mean, clip=median": 2, "product, clip=median": 2},
        limits=worst,
        pairs=tuple(rows),
        equal={"subspaces that nobody attacks, against a run without the hostile clients": "bit for bit"},
        notes=(f"merge=product under the gauge attack: error {gauges:.2g} (relative, no clip)",),
    )


def grid(name: str, case: Case, attacks: Mapping[str, Forge], seeds: int) -> Iterator[dict[str, Any]]:
    """One row per attack and rule: means over the seeds, and the worst error in honest spreads."""
    for attack, forge in attacks.items():
        for rule in RULES:
            found = [trial(case, RULES[rule], attack, forge, seed) for seed in range(seeds)]
            yield {
                "case": name,
                "attack": attack,
                "rule": rule,
                "error": plain(fmean(one["error"] for one in found)),
                "spread": fmean(one["spread"] for one in found),
                "worst": plain(max(one["error"] / one["spread"] for one in found)),
                "refused": found[0]["refused"],
            }


def trial(case: Case, rule: Rule, attack: str, forge: Forge, seed: int) -> dict[str, float]:
    """The worst subspace of one attacked round; what nobody attacked has the bits of a run without the hostile."""
    hostile = dict.fromkeys(case.hostile if attack != "none" else (), forge)
    attacked = _begun(case, rule, attack, seed)
    starts = {j: _adapter(attacked, j) for j in range(case.groups)}
    if case.hijack:
        attacked.tokens = dict.fromkeys(hostile, VICTIM)
    refused = len(attacked.next(hostile).rejected)
    hit = {attacked.tokens.get(client, client % case.groups) for client in hostile} or {VICTIM}
    if hostile and len(hit) < case.groups:
        without = _begun(case, rule, attack, seed)
        without.away = frozenset(hostile)
        without.next()
        for j in set(range(case.groups)) - hit:
            assert _adapter(without, j).tobytes() == _adapter(attacked, j).tobytes(), f"{attack} reached subspace {j}"
    error, spread = max(_error(attacked, j, starts[j]) for j in hit)
    return {"error": error, "spread": spread, "refused": refused}


def _begun(case: Case, rule: Rule, attack: str, seed: int) -> Federation:
    """A federation before the attacked round: after an honest one, unless the first round is the attacked one."""
    suspects = max(1, len(case.hostile) // (1 if len({c % case.groups for c in case.hostile}) == 1 else case.groups))
    options = {"merge": rule.merge, "suspects": len(case.hostile) if case.hijack else suspects}
    federation = Federation(options, case.groups, case.spread, seed, rule.clip, rule.gated)
    if attack != FIRST:
        federation.next()
    return federation


def _adapter(federation: Federation, subspace: int) -> Flat:
    """A subspace's adapter as it is; one that was never trained is as its clients get it."""
    known = federation.strategy.state.subspaces
    return known[subspace].adapter if subspace < len(known) else fresh(LAYOUT, RANK, federation.seed, subspace)


def _error(federation: Federation, subspace: int, start: Flat) -> tuple[float, float]:
    """(error, honest spread) of a subspace after the attacked round, both relative to the honest mean step."""
    good = [client for client in federation.members(subspace) if client not in federation.forge]
    before = product(start)
    steps = np.stack([product(honest(federation, client, start)) - before for client in good])
    mean = steps.mean(axis=0)
    length = np.linalg.norm(mean)
    spread = np.sqrt(((steps - mean) ** 2).sum(axis=1).mean()) / length
    error = np.linalg.norm(product(_adapter(federation, subspace)) - before - mean) / length
    return (float(error) if np.isfinite(error) else float("inf")), float(spread)


def plain(value: float) -> float | None:
    """None for what JSON has no number for: the model is lost."""
    return value if np.isfinite(value) else None
