"""Runs side by side: grouping, means and deviations worked out by hand, and what must not be mixed."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from fedstrata.core.errors import BadInput
from fedstrata.server.compare import Comparison, compare, result_json
from fedstrata.server.tables import Spread

WriteRun = Callable[..., Path]


def ending(last: float) -> list[tuple[float, float]]:
    return [(0.0, 10.0), (90.0, 20.0), (last, last)]


def value(comparison: Comparison, strategy: str, measure: str) -> object:
    """The mean that the CSV's source holds for one scenario's cell."""
    (line,) = [v for v in comparison.json()["values"] if (v["strategy"], v["measure"]) == (strategy, measure)]
    return line["mean"]


def labels(comparison: Comparison) -> list[list[str]]:
    return [[row.label for row in table.rows] for table in comparison.tables]


def test_mean_and_sample_deviation_over_seeds(write_run: WriteRun) -> None:
    runs = [write_run(f"s{seed}", seed=seed, rows=ending(last)) for seed, last in ((0, 70.0), (1, 74.0), (2, 78.0))]
    comparison = compare(runs)
    (row,) = comparison.tables[0].rows
    assert row.measures["last"] == Spread(74.0, 4.0, 3)
    assert row.tasks["names"] == Spread(74.0, 4.0, 3)
    assert row.seeds == (0, 1, 2)
    assert "74.0 ± 4.0" in comparison.markdown()


def test_a_single_seed_has_no_deviation(write_run: WriteRun) -> None:
    assert "±" not in compare([write_run()]).markdown()


def test_options_that_differ_are_spelled_and_defaults_are_not(write_run: WriteRun) -> None:
    runs = [
        write_run("eight", "finetune", options={"subspaces": 8}),
        write_run("one", "finetune", options={"subspaces": 1}),
    ]
    assert labels(compare(runs)) == [["finetune (subspaces=1)", "finetune (subspaces=8)"]]
    defaults = {"finetune": {"subspaces": 8}}
    assert labels(compare(runs, defaults)) == [["finetune", "finetune (subspaces=1)"]]
    assert labels(compare(runs[1:], defaults)) == [["finetune (subspaces=1)"]]
    assert labels(compare(runs[1:])) == [["finetune"]]


def test_other_settings_are_spelled_only_where_they_differ_from_the_default(write_run: WriteRun) -> None:
    usual = write_run("usual", config={"train": {"lr": 3e-3}})
    fast = write_run("fast", config={"train": {"lr": 0.01}})
    assert labels(compare([usual, fast])) == [["disco", "disco (train.lr=0.01)"]]


def test_how_many_actors_worked_makes_no_other_row(write_run: WriteRun) -> None:
    runs = [write_run(f"a{n}", seed=n, config={"federation": {"clients": 4, "actors": n}}) for n in (1, 2)]
    assert labels(compare(runs)) == [["disco"]]


def test_scenarios_get_tables_of_their_own_and_a_missing_cell_reads_not_run(write_run: WriteRun) -> None:
    runs = [
        write_run("a", "disco"),
        write_run("b", "finetune"),
        write_run("c", "disco", config={"scenario": {"name": "other", "beta": None}}, tasks=("x", "y")),
    ]
    comparison = compare(runs)
    assert [(table.scenario, table.tasks) for table in comparison.tables] == [
        ("other", ("x", "y")),
        ("toy", ("names", "charts")),
    ]
    assert labels(comparison) == [["finetune", "disco"]] * 2
    assert [row.empty for table in comparison.tables for row in table.rows if not row.seeds] == ["not run"]
    assert "| finetune | 0 | not run | not run |" in comparison.markdown()


def test_options_that_a_method_has_in_another_scenario_only_are_no_row(write_run: WriteRun) -> None:
    other = {"scenario": {"name": "other", "beta": None}}
    runs = [write_run("a", "disco", options={"tau": 0.5}), write_run("b", "disco", 0, {"tau": 0.9}, other)]
    runs.append(write_run("c", "finetune", config=other))
    assert labels(compare(runs)) == [["finetune", "disco (tau=0.9)"], ["finetune", "disco (tau=0.5)"]]


def test_another_beta_is_another_table(write_run: WriteRun) -> None:
    runs = [write_run(f"b{beta}", config={"scenario": {"name": "toy", "beta": beta}}) for beta in (0.5, 1.0)]
    assert [table.scenario for table in compare(runs).tables] == ["toy (beta=0.5)", "toy (beta=1.0)"]


def test_two_definitions_of_one_scenario_are_refused(write_run: WriteRun) -> None:
    runs = [write_run("old", "disco"), write_run("new", "finetune", summary={"scenario_hash": "changed"})]
    with pytest.raises(BadInput, match=r"scenario toy, seed 0: two definitions.*old.*hash-0.*new.*changed"):
        compare(runs)


def test_a_run_that_was_not_completed_is_listed_and_not_averaged(write_run: WriteRun) -> None:
    runs = [
        write_run("good", rows=ending(70.0)),
        write_run("stopped", seed=1, rows=ending(10.0), summary={"status": "interrupted"}),
        write_run("running", "finetune", ended=False),
    ]
    (runs[1] / "matrix.json").unlink()
    comparison = compare(runs)
    assert value(comparison, "disco", "last") == 70.0
    assert value(comparison, "finetune", "last") == "not completed"
    told = " ".join(comparison.notes)
    assert "stopped (disco, seed 1) is interrupted" in told
    assert "running (finetune, seed 0) is not finished" in told


def test_a_second_run_of_the_same_cell_is_told_and_not_averaged(write_run: WriteRun) -> None:
    first = write_run("first", rows=ending(70.0))
    twin = write_run("twin", rows=ending(70.0))
    other = write_run("other", rows=ending(50.0))
    comparison = compare([first, twin, other, first])
    assert value(comparison, "disco", "last") == 70.0
    assert ["same result" in note for note in comparison.notes] == [True, False]
    assert "DIFFER (last 70.0 and 50.0)" in comparison.notes[1]


def test_the_gap_closed_is_taken_from_the_means(write_run: WriteRun) -> None:
    lasts = {"finetune": (20.0, 30.0), "joint": (70.0, 80.0), "disco": (65.0, 75.0)}
    runs = [write_run(f"{n}{s}", n, seed=s, rows=ending(x)) for n, xs in lasts.items() for s, x in enumerate(xs)]
    comparison = compare(runs)
    assert comparison.tables[0].gaps == {"disco": pytest.approx(90.0)}  # (70 - 25) / (75 - 25)
    assert labels(comparison) == [["finetune", "disco", "joint"]]
    assert "90 %" in comparison.markdown()
    assert value(comparison, "disco", "gap_closed") == pytest.approx(90.0)


def test_no_gap_where_joint_is_less_than_20_points_above_finetune(write_run: WriteRun) -> None:
    lasts = {"finetune": 50.0, "joint": 69.9, "disco": 65.0}
    comparison = compare([write_run(n, n, rows=ending(x)) for n, x in lasts.items()])
    assert comparison.tables[0].gaps == {"disco": None}
    assert comparison.markdown().splitlines()[5].endswith("| – |")


def test_the_baseline_among_several_finetunes_is_the_one_with_default_options(write_run: WriteRun) -> None:
    runs = [
        write_run("f8", "finetune", options={"subspaces": 8}, rows=ending(20.0)),
        write_run("f1", "finetune", options={"subspaces": 1}, rows=ending(40.0)),
        write_run("j", "joint", rows=ending(80.0)),
        write_run("d", "disco", rows=ending(80.0)),
    ]
    assert compare(runs, {"finetune": {"subspaces": 8}}).tables[0].gaps == {"disco": 100.0}
    assert compare(runs).tables[0].gaps == {}


def test_a_result_file_says_the_same_as_its_folder(write_run: WriteRun, tmp_path: Path) -> None:
    runs = [write_run("a", seed=0), write_run("b", seed=1, rows=ending(60.0))]
    files = [tmp_path / f"{run.name}.json" for run in runs]
    for run, file in zip(runs, files, strict=True):
        file.write_text(json.dumps(result_json(run)), encoding="utf-8")
        for path in [*run.iterdir()]:
            assert str(path) not in file.read_text(encoding="utf-8")
    assert compare(files).csv() == compare(runs).csv() == compare([runs[0], files[1]]).csv()


def test_a_result_file_names_what_made_it(write_run: WriteRun) -> None:
    tree = result_json(write_run())
    assert tree["last_by_task"] == {"names": 80.0, "charts": 70.0}
    assert tree["finished"] == "2026-01-02T03:05:00.000+00:00"
    assert tree["versions"]["flwr"] == "1.41.0"
    assert tree["machine"]["cores"] >= 1
    assert "run" not in tree["config"]


def test_the_config_hash_is_equal_for_runs_that_must_agree(write_run: WriteRun) -> None:
    one, two = (write_run(f"a{n}", config={"federation": {"clients": 4, "actors": n}}) for n in (1, 2))
    other = write_run("seed", seed=1)
    hashes = [result_json(run)["config_hash"] for run in (one, two, other)]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not a readable JSON"), ("[]", "not a result file"), ('{"version": 1, "config": {}}', "summary: must hold")],
)
def test_a_broken_result_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match=rf"bad\.json: .*{message}"):
        compare([file])


def test_nothing_to_compare_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="at least one"):
        compare([])
    with pytest.raises(BadInput, match="no such run folder"):
        compare([tmp_path / "nowhere"])


def test_markup_in_names_stays_text(write_run: WriteRun) -> None:
    comparison = compare([write_run(tasks=("[red]a|b", "<b>"))])
    assert "[red]a\\|b | &lt;b>" in comparison.markdown()
    console = Console(file=io.StringIO(), width=200)
    console.print(comparison.table())
    assert "[red]a|b" in console.file.getvalue()  # type: ignore[attr-defined]


def test_many_methods_with_long_names_are_whole_in_a_terminal_of_80_columns(write_run: WriteRun) -> None:
    rates = [round(1e-3 + step * 1e-4, 5) for step in range(13)]
    runs = enumerate(rates)
    comparison = compare([write_run(f"r{i}", config={"train": {"lr": r}}, rows=ending(60.0 + i)) for i, r in runs])
    console = Console(file=io.StringIO(), width=80)
    console.print(comparison.table())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert [f"{60 + i}.0" in shown for i in range(13)] == [True] * 13
    letters = "".join(shown.split())
    assert "…" not in shown
    assert all(f"{rate}" in letters for rate in (rates[0], rates[-1]))


def test_the_csv_has_one_line_per_measure_and_task(write_run: WriteRun) -> None:
    lines = list(csv.DictReader(io.StringIO(compare([write_run()]).csv())))
    found = {line["measure"]: line["mean"] for line in lines}
    assert (found["last"], found["last/names"], found["bytes_up"]) == ("75.0", "80.0", "3000.0")
    assert {line["std"] for line in lines} == {""}
