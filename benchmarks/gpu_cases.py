"""Local training on a GPU, ours against clients one after another: what is compared at which shape."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from fedstrata.benchmarks.gpu_parts import TOY, Load, Shape, card, device_of, jobs_of, random_base
from fedstrata.benchmarks.gpu_sides import Ours, Sequential, activation_bytes, fitting, same
from fedstrata.benchmarks.measure import Result, paired, ratios, raw

RECIPE = "the published recipe (PEFT, one client after another, checkpointing)"
LOOP = "a PEFT loop, one client after another"


@dataclass(frozen=True)
class Case:
    """One comparison: a shape, its work, the other side, and what is aimed at.

    Attributes:
        checkpointing: of the other side.
        ratio: the other side's time over ours, at least.
        per: token | client-step | round: what `most` microseconds are allowed for.
    """

    name: str
    shape: Shape
    load: Load
    targets: Sequence[str]
    checkpointing: bool
    ratio: float | None
    per: str
    most: float
    repeats: int = 5

    @property
    def limit(self) -> str:
        return f"µs per {self.per}"

    def units(self) -> int:
        """How many of `per` a round has."""
        return {"token": self.load.tokens, "client-step": self.load.steps, "round": 1}[self.per]

    def toy(self) -> "Case":
        """The same at a size of seconds on a CPU."""
        batch = min(2, self.load.batch)
        return replace(self, shape=TOY, load=Load(min(3, self.load.clients), 2 * batch, batch, 12, 4), repeats=2)


def compare(case: Case, quick: bool) -> Result:
    """Both sides of a case; quick: at a toy shape on the CPU."""
    device = device_of(case.name, quick)
    case = case.toy() if quick else case
    base = random_base(case.shape, device, case.targets)
    jobs = jobs_of(base, case.load, case.shape.vocabulary)
    kept = activation_bytes(base, jobs[0], case.load.settings)
    cohort = fitting(base, case.load, kept)
    ours = Ours(base, jobs, case.load, cohort)
    theirs = Sequential(base, jobs, case.load, case.checkpointing)
    equal = same(ours.round(), theirs.round(), jobs[0].flat)
    name = RECIPE if case.checkpointing else LOOP
    rounds = paired({"ours": ours.round, name: theirs.round}, case.repeats, warm=0)
    spent = median(pair["ours"].wall for pair in rounds) / case.units()
    targets = {case.limit: case.most} | ({} if case.ratio is None else {name: case.ratio})
    return Result(
        name=case.name,
        what=f"{case.load.words()}; hidden {case.shape.hidden}, {case.shape.layers} layers",
        clock="wall",
        ratios=ratios(rounds, "ours", "wall"),
        targets=targets,
        limits={case.limit: 1e6 * spent},
        pairs=raw(rounds),
        equal=equal,
        notes=(
            card(device),
            f"{1 / spent:,.4g} {case.per}s per second, cohorts of {cohort}; {kept:,.0f} bytes a token",
        ),
    )
