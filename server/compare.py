"""`fedstrata compare`: runs side by side, one table per scenario, mean ± sample standard deviation over seeds.

Runs of one method are one row as long as their options agree; options that differ are spelled in the row's label.
Only completed runs are averaged; the others are listed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedstrata.core.config import RunConfig, to_dict
from fedstrata.core.errors import BadInput, unknown
from fedstrata.server.paired import Paired, paired
from fedstrata.server.results import Result, load, result_json, settings
from fedstrata.server.tables import MEASURES, OPTIONAL, Comparison, Row, ScenarioTable, Spread

__all__ = ["Comparison", "compare", "result_json"]

NOT_RUN, NOT_COMPLETED = "not run", "not completed"
BASELINE, BOUND = "finetune", "joint"
WORTH = 20.0  # points that joint must be above finetune before a gap says anything
DEFINING = ("scenario.", "federation.clients")  # what a scenario's data depends on, beside the seed
Defaults = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class _Run:
    """A result and where it goes: the table and the row."""

    result: Result
    scenario: str = ""
    label: str = ""

    @property
    def cell(self) -> tuple[str, str, int]:
        return self.scenario, self.label, self.result.seed


def compare(runs: Sequence[Path], defaults: Defaults | None = None, baseline: str = "") -> Comparison:
    """Reads run folders and result files (`result_json`) and sets them side by side.

    Args:
        runs: run folders or result files, in any mix and order.
        defaults: strategy name → its options' default values; an option at its default is left out of the label.
        baseline: the row that the others' `last` is compared with, seed by seed; empty: none.

    Raises:
        BadInput: nothing to compare, a broken folder or file, or two definitions of one scenario.
    """
    if not runs:
        raise BadInput("compare: name at least one run folder or result file")
    return side_by_side([load(path) for path in {path.resolve(): path for path in runs}.values()], defaults, baseline)


def side_by_side(results: Sequence[Result], defaults: Defaults | None = None, baseline: str = "") -> Comparison:
    """`compare` for results that are read already; one with status "not run" makes an empty row or a missing seed.

    Raises:
        BadInput: two definitions of one scenario, or a baseline that is no row.
    """
    placed = _placed(results, defaults or {})
    _one_definition(placed)
    done, notes = _distinct([run for run in placed if run.result.completed])
    missing = [run for run in placed if run.result.summary["status"] == NOT_RUN]
    notes += [_unfinished(run) for run in placed if not run.result.completed and run not in missing]
    notes += [f"{len(missing)} of {len(placed)} cells are not run"] if missing else []
    labels = sorted({run.label for run in placed}, key=lambda label: (_rank(label), label))
    if baseline and baseline not in labels:
        raise unknown("baseline", baseline, labels)
    tables = [_table(name, placed, done, labels, baseline) for name in sorted({run.scenario for run in placed})]
    return Comparison(tuple(tables), tuple(notes))


def _placed(results: Sequence[Result], defaults: Defaults) -> list[_Run]:
    in_tables = [_Run(result, scenario=_scenario(result, results)) for result in results]
    return [replace(run, label=_label(run, in_tables, defaults)) for run in in_tables]


def _scenario(result: Result, results: Sequence[Result]) -> str:
    """The scenario's name, with what else defines it where that differs among the runs of that name."""
    twins = [other for other in results if other.scenario == result.scenario]
    words = [
        f"{key.removeprefix('scenario.')}={value}"
        for key, value in result.settings.items()
        if key.startswith(DEFINING[0]) or key == DEFINING[1]
        if any(other.settings.get(key) != value for other in twins)
    ]
    return f"{result.scenario} ({', '.join(words)})" if words else result.scenario


def _label(run: _Run, runs: Sequence[_Run], defaults: Defaults) -> str:
    """The strategy's name with the options that set it apart from its defaults or from other runs of that name.

    Options of the method are compared across all tables, so that a method has one label everywhere; other settings
    only within a table, because scenarios bring their own.
    """
    name = run.result.strategy
    known = {f"strategy.{key}": value for key, value in defaults.get(name, {}).items()}
    usual = settings(to_dict(RunConfig())) | known
    twins = [other for other in runs if other.result.strategy == name]
    words = []
    for key, value in run.result.settings.items():
        if key in ("seed", "strategy.name", "model.matmul") or key.startswith("scenario."):
            continue
        near = [other for other in twins if key.startswith("strategy.") or other.scenario == run.scenario]
        varies = any(other.result.settings.get(key) != value for other in near)
        if (varies or key in known) and (key not in usual or usual[key] != value):
            words.append(f"{key.removeprefix('strategy.')}={value}")
    return f"{name} ({', '.join(words)})" if words else name


def _one_definition(runs: Sequence[_Run]) -> None:
    """Data is a function of the scenario and the seed: two hashes in one table for one seed are two definitions."""
    seen: dict[tuple[str, int], _Run] = {}
    for run in runs:
        made = run.result.summary.get("scenario_hash")
        if made is None:
            continue
        other = seen.setdefault((run.scenario, run.result.seed), run).result
        if other.summary["scenario_hash"] != made:
            raise BadInput(
                f"scenario {run.scenario}, seed {run.result.seed}: two definitions cannot share a table: "
                f"{other.source} has hash {other.summary['scenario_hash']}, {run.result.source} has {made}"
            )


def _distinct(runs: Sequence[_Run]) -> tuple[list[_Run], list[str]]:
    """One run per scenario, label and seed: the first. A second one is told, loudly when its result is another."""
    kept: dict[tuple[str, str, int], _Run] = {}
    notes = []
    for run in runs:
        one = kept.setdefault(run.cell, run)
        if one is not run:
            a, b = one.result, run.result
            told = "have the same result" if _same(a, b) else f"DIFFER (last {a.value('last')} and {b.value('last')})"
            notes.append(f"{run.label}, seed {a.seed}: {a.source} and {b.source} {told}; the first is used")
    return list(kept.values()), notes


def _same(a: Result, b: Result) -> bool:
    key = "final_state_sha256"
    return a.matrix == b.matrix and a.summary.get(key) == b.summary.get(key)


def _unfinished(run: _Run) -> str:
    result = run.result
    return f"not averaged: {result.source} ({run.label}, seed {result.seed}) is {result.summary['status']}"


def _rank(label: str) -> int:
    """Baseline first, upper bound last, methods between."""
    name = label.split(" ")[0]
    return 0 if name == BASELINE else 2 if name == BOUND else 1


def _table(
    scenario: str, placed: Sequence[_Run], done: Sequence[_Run], labels: Sequence[str], baseline: str
) -> ScenarioTable:
    here = [run for run in placed if run.scenario == scenario]
    labels = _asked(labels, here)
    tasks = tuple(dict.fromkeys(task for run in here for task in run.result.matrix.tasks))
    ran = {label: [run.result for run in done if (run.scenario, run.label) == (scenario, label)] for label in labels}
    begun = {run.label for run in here if run.result.summary["status"] != NOT_RUN}
    rows = [_row(label, ran[label], NOT_COMPLETED if label in begun else NOT_RUN, tasks) for label in labels]
    differences = _differences(ran, baseline) if baseline else {}
    return ScenarioTable(scenario, tasks, tuple(rows), _gaps(rows), baseline, differences)


def _asked(labels: Sequence[str], here: Sequence[_Run]) -> list[str]:
    """The rows of a table: a method that was run elsewhere, too, but not with options that nobody asked for here."""
    asked, known = {run.label for run in here}, {run.result.strategy for run in here}
    return [label for label in labels if label in asked or label.split(" ")[0] not in known]


def _differences(ran: Mapping[str, Sequence[Result]], baseline: str) -> dict[str, Paired | None]:
    """Label of every other row → what its `last` is above the baseline's, over the seeds that both have."""
    last = {label: {result.seed: result.value("last") for result in results} for label, results in ran.items()}
    beside = last.get(baseline, {})
    return {label: paired(values, beside) for label, values in last.items() if label != baseline}


def _row(label: str, results: Sequence[Result], empty: str, tasks: Sequence[str]) -> Row:
    measures = {name: Spread.of([result.value(name) for result in results]) for name in (*MEASURES, *OPTIONAL)}
    by_task = {task: Spread.of([result.matrix.final.get(task) for result in results]) for task in tasks}
    stages = tuple(map(Spread.of, zip(*(result.matrix.by_stage for result in results), strict=True)))
    seeds = tuple(sorted(result.seed for result in results))
    return Row(label, label.split(" ")[0], seeds, empty, measures, by_task, stages)


def _gaps(rows: Sequence[Row]) -> dict[str, float | None]:
    """Label of each method run here → (D − F)/(J − F) of the means, in percent; empty without finetune or joint."""
    floor, ceiling = _last(rows, BASELINE), _last(rows, BOUND)
    if floor is None or ceiling is None:
        return {}
    methods = {row.label: row.measures["last"] for row in rows if row.strategy not in (BASELINE, BOUND)}
    worth = ceiling - floor >= WORTH
    return {
        label: 100 * (spread.mean - floor) / (ceiling - floor) if worth else None
        for label, spread in methods.items()
        if spread is not None
    }


def _last(rows: Sequence[Row], name: str) -> float | None:
    """Mean `last` of the one row of that strategy that was run, or of the one with default options among several."""
    run = [row for row in rows if row.strategy == name and row.measures["last"] is not None]
    chosen = run if len(run) == 1 else [row for row in run if row.label == name]
    spread = chosen[0].measures["last"] if chosen else None
    return None if spread is None else spread.mean
