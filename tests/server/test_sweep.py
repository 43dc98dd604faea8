"""Sweeps: which cells there are, what is run, skipped, resumed and tried again, and what the table says of it."""

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from fedstrata.core.config import to_dict
from fedstrata.core.errors import BadInput, FedstrataError, Interrupted
from fedstrata.scenarios import LIBRARY
from fedstrata.server import configure, jobs, launch, worker
from fedstrata.server.cells import Cell, cells, present, split
from fedstrata.server.cli import main
from fedstrata.server.compare import compare
from fedstrata.server.paired import Paired, paired
from fedstrata.server.raystart import start_ray
from fedstrata.server.sweep import State, Sweep, check, look
from fedstrata.server.sweeppage import comparison, show_plan, summary, write_page
from fedstrata.server.worker import Answer, Job, Worker
from fedstrata.strategies import STRATEGIES

WriteRun = Callable[..., Path]
DOCS = Path(__file__).resolve().parents[2] / "docs"
SMALL = ("fcit-mini-short", "federation.grid=inprocess", "train.local_epochs=1", "federation.rounds_per_stage=1")


def names(*words: str, recipe: str = "fcit-mini-short") -> list[str]:
    return [cell.name for cell in cells(recipe, words)]


# which cells there are


def test_cells_are_every_combination_with_the_seeds_outermost() -> None:
    assert names("strategy.name=finetune,disco", "seed=0,1") == [
        "fcit-mini-short-finetune-seed0",
        "fcit-mini-short-disco-seed0",
        "fcit-mini-short-finetune-seed1",
        "fcit-mini-short-disco-seed1",
    ]
    assert names("lora.rank=2,4", "seed=3") == [
        "fcit-mini-short-disco+lora.rank=2-seed3",
        "fcit-mini-short-disco+lora.rank=4-seed3",
    ]
    both = cells("", ["scenario.name=fcit-mini-short,fcit-mini-small-het", "strategy.name=joint"])
    assert [(cell.config.scenario.name, cell.config.train.lr) for cell in both] == [
        ("fcit-mini-short", 1e-3),  # tuned for joint in the scenario's file
        ("fcit-mini-small-het", 1e-3),
    ]


def test_a_sweep_file_may_tune_each_strategy_and_words_win(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    tuned = {"disco": {"train": {"lr": 3e-3}, "strategy": {"epsilon": 0.2}}, "joint": {"train": {"lr": 4e-3}}}
    sweep = {"scenario.name": ["fcit-mini-short"], "strategy.name": ["finetune", "disco+activation=argmax"]}
    path.write_text(yaml.safe_dump({"tuned": tuned, "sweep": sweep}), encoding="utf-8")
    plain, hard = cells(str(path), [])
    assert (plain.config.train.lr, hard.config.train.lr) == (1e-3, 3e-3)
    assert (hard.config.strategy.epsilon, hard.config.strategy.activation) == (0.2, "argmax")  # type: ignore[attr-defined]
    assert hard.name == "fcit-mini-short-disco+activation=argmax-seed0"
    alone = configure.resolve(*configure.split_recipe(hard.words))
    assert alone == hard.config
    assert {cell.config.train.lr for cell in cells(str(path), ["train.lr=5e-3"])} == {5e-3}
    path.write_text(yaml.safe_dump({"tuned": ["disco"], "sweep": sweep}), encoding="utf-8")
    with pytest.raises(BadInput, match="tuned: must map strategies to config keys"):
        cells(str(path), [])


def test_a_strategy_may_bring_options_of_its_own() -> None:
    plain, hard = cells("fcit-mini-short", ["strategy.name=disco,disco+activation=argmax+tau=0.7"])
    assert (plain.config.strategy.activation, hard.config.strategy.activation) == ("softmax", "argmax")  # type: ignore[attr-defined]
    assert hard.name == "fcit-mini-short-disco+activation=argmax+tau=0.7-seed0"
    alone = configure.resolve(*configure.split_recipe(hard.words))
    assert alone == hard.config


def test_commas_within_brackets_do_not_separate_values() -> None:
    assert split("[q_proj,v_proj],[up_proj]") == ["[q_proj,v_proj]", "[up_proj]"]
    first, second = cells("fcit-mini-short", ["lora.targets=[q_proj,v_proj],[up_proj]"])
    assert (first.config.lora.targets, second.config.lora.targets) == (["q_proj", "v_proj"], ["up_proj"])


def test_a_sweep_file_gives_keys_for_all_cells_and_words_win(tmp_path: Path) -> None:
    tree = {
        "scenario": {"name": "fcit-mini-short"},
        "train": {"lr": 0.5},
        "sweep": {"strategy.name": ["disco", "ewc"], "seed": [0, 1]},
    }
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    found = cells(str(path), ["seed=7"])
    assert [cell.name for cell in found] == ["fcit-mini-short-disco-seed7", "fcit-mini-short-ewc-seed7"]
    assert {cell.config.train.lr for cell in found} == {0.5}
    path.write_text(yaml.safe_dump({"sweep": {"seed": 3}}), encoding="utf-8")
    with pytest.raises(BadInput, match=r"table.yaml: sweep: must map config keys to lists of values"):
        cells(str(path), [])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["strategy.name=disco,dsico"], "did you mean 'disco'"),
        (["seed=0,0"], "cells must differ, got two of fcit-mini-short-disco-seed0"),
        (["run.dir=here"], "run.dir: a sweep gives every cell a folder of its own"),
        (["seed"], "expected key=value or key=value,value"),
    ],
)
def test_a_mistake_in_one_cell_is_told_before_any_is_run(words: list[str], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        cells("fcit-mini-short", words)


def test_a_result_of_before_a_key_existed_is_of_its_default() -> None:
    (cell,) = cells("fcit-mini-short", ["strategy.name=finetune"])
    config = to_dict(cell.config)
    config["model"]["matmul"] = "onednn"  # auto, as one machine resolved it
    del config["train"]["overlong"], config["strategy"]["subspaces"], config["run"]
    assert cell.matches(present(config))
    assert not cell.matches(present({**config, "seed": 1}))
    assert not cell.matches(present({**config, "train": {**config["train"], "lr": 0.1}}))
    assert present({**config, "gone": 1}) == {}
    assert not cell.matches({})
    (other,) = cells("fcit-mini-short", ["strategy.name=finetune", "model.matmul=default"])
    assert not other.matches(present(config))


# what is run


class Scripted:
    """Stands in for `Worker`: answers as told per cell, and leaves a completed run folder behind for code 0."""

    def __init__(self, answers: Mapping[str, list[int]], finish: Callable[[Job], None]) -> None:
        self.answers, self.finish, self.asked = dict(answers), finish, list[tuple[str, bool]]()

    def run(self, job: Job) -> Answer:
        name = Path(job.folder).name
        self.asked.append((name.split("-")[-2], job.resume))
        code = self.answers[name.split("-")[-2]].pop(0)
        if code == 0:
            self.finish(job)
        return Answer(code, "" if code == 0 else f"code {code}")

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        pass


Script = Callable[..., tuple[Sweep, Scripted]]


@pytest.fixture
def scripted(write_run: WriteRun, tmp_path: Path) -> Script:
    """A sweep of one job whose runs end as scripted."""

    def make(results: Path | None = None, **answers: list[int]) -> tuple[Sweep, Scripted]:
        grid = cells("fcit-mini-short", ["strategy.name=" + ",".join(answers)])
        by_name = {cell.name: cell for cell in grid}

        def finish(job: Job) -> None:
            folder = Path(job.folder)
            config = to_dict(by_name[folder.name].config)
            for old in folder.glob("*"):
                old.unlink()
            if folder.exists():
                folder.rmdir()
            write_run(folder.name, config["strategy"]["name"], config=config)

        sweep = Sweep(look(grid, tmp_path, results), tmp_path, results, 1, lambda line: None)
        fake = Scripted(answers, finish)
        sweep.hands = lambda: nullcontext([fake])  # type: ignore[assignment]
        return sweep, fake

    return make


def statuses(states: list[State]) -> dict[str, str]:
    return {state.cell.config.strategy.name: state.status for state in states}


def test_a_failed_cell_is_tried_once_more_and_bad_input_is_not(scripted: Script) -> None:
    sweep, fake = scripted(finetune=[1, 0], disco=[1, 1], ewc=[2], olora=[0])
    states = sweep.run()
    assert statuses(states) == {"finetune": "completed", "disco": "failed", "ewc": "failed", "olora": "completed"}
    assert [name for name, _ in fake.asked] == ["finetune", "finetune", "disco", "disco", "ewc", "olora"]
    with pytest.raises(FedstrataError, match=r"^2 of 4 cells: fcit-mini-short-disco-seed0 is failed: code 1; ") as said:
        check(states)
    assert said.value.exit_code == 1


def test_what_has_begun_is_resumed_and_what_is_completed_is_not_run(scripted: Script, tmp_path: Path) -> None:
    sweep, fake = scripted(finetune=[0], disco=[75])
    folder = tmp_path / "fcit-mini-short-finetune-seed0"
    folder.mkdir()
    (config,) = [cell.config for cell in cells("fcit-mini-short", ["strategy.name=finetune"])]
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
    states = sweep.run()
    assert fake.asked == [("finetune", True), ("disco", False)]
    assert statuses(states) == {"finetune": "completed", "disco": "not run"}
    again, fake = scripted(finetune=[], disco=[0])
    check(again.run())
    assert fake.asked == [("disco", False)]


def test_a_result_file_is_written_once_and_stands_for_its_cell(scripted: Script, tmp_path: Path) -> None:
    results = tmp_path / "results"
    states = scripted(results, finetune=[0], disco=[0])[0].run()
    assert [state.source for state in states] == sorted(results.glob("*.json"), reverse=True)
    kept = json.loads((results / "fcit-mini-short-disco-seed0.json").read_text(encoding="utf-8"))
    assert {"config_hash", "commit", "machine", "versions", "summary", "matrix"} <= set(kept)
    elsewhere = look([state.cell for state in states], tmp_path / "empty", results)
    assert statuses(elsewhere) == {"finetune": "completed", "disco": "completed"}
    changed = cells("fcit-mini-short", ["strategy.name=disco", "train.lr=0.5"])
    with pytest.raises(BadInput, match=r"fcit-mini-short-disco-seed0.json: holds a run with another config"):
        look(changed, tmp_path / "empty", results)
    with pytest.raises(BadInput, match=r"fcit-mini-short-disco-seed0: holds a run with another config"):
        look(changed, tmp_path, None)


def test_ctrl_c_stops_the_sweep_and_says_how_to_go_on(scripted: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, _ = scripted(finetune=[0], disco=[0])

    def interrupted(*given: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedstrata.server.sweep.wait", interrupted)
    with pytest.raises(Interrupted, match="the same command goes on with it"):
        sweep.run()
    assert sweep.stopped.is_set()


# the process


def test_a_process_that_dies_has_failed_its_job_and_is_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(worker, "START", "import sys; sys.stdin.readline(); sys.exit(3)")
    one, job = Worker(tmp_path / "log"), Job((), str(tmp_path), False, "")
    first, second = one.run(job), one.run(job)
    assert (first.code, second.code) == (1, 1)
    assert first.reason == f"its process ended with code 3; see {tmp_path / 'log'}"
    monkeypatch.setattr(worker, "START", """print('{"code": 0, "reason": ""}', flush=True)""")
    assert one.run(job) == Answer(0)
    one.interrupt()
    assert one.run(job) == Answer(75, "interrupted before it began")
    one.close()


def test_the_committed_results_are_the_cells_of_the_commands_on_their_page() -> None:
    lines = (DOCS / "results.md").read_text(encoding="utf-8").splitlines()
    commands = [line.partition("fedstrata sweep ")[2].partition(" --")[0] for line in lines if " sweep " in line]
    words = [command.split() for command in commands if "=" in command]
    assert len(words) >= 3
    found = [look(cells(*configure.split_recipe(each)), DOCS / "none", DOCS / "results") for each in words]
    assert {state.status for states in found for state in states} == {"completed"}
    assert sum(map(len, found)) == len({state.source for states in found for state in states})


def test_every_cell_of_the_tables_has_been_run() -> None:
    for table, size in (("full", 72), ("domain", 15)):
        states = look(cells(str(DOCS / f"{table}-table.yaml"), []), DOCS / "none", DOCS / "results" / table)
        assert [state.status for state in states] == ["completed"] * size
    swept = yaml.safe_load((DOCS / "big-table.yaml").read_text(encoding="utf-8"))["sweep"]
    size = math.prod(len(values) for values in swept.values())
    assert len(list((DOCS / "results" / "small").glob("*.json"))) == size == 288


def test_the_big_table_leaves_no_strategy_out() -> None:
    swept = yaml.safe_load((DOCS / "big-table.yaml").read_text(encoding="utf-8"))["sweep"]
    assert sorted(name for name in swept["strategy.name"] if "+" not in name) == sorted(STRATEGIES)
    assert (len(swept["scenario.name"]), swept["seed"]) == (3, [0, 1, 2])
    first = cells(str(DOCS / "big-table.yaml"), ["strategy.name=disco,hide", "scenario.name=fcit-mini-small-het"])
    assert [cell.config.seed for cell in first] == [0, 0, 1, 1, 2, 2]


# the table


def test_a_paired_difference_has_students_interval() -> None:
    ours, theirs = {0: 11.0, 1: 22.0, 2: 33.0, 3: 5.0}, {0: 10.0, 1: 20.0, 2: 30.0, 9: 1.0}
    found = paired(ours, theirs)
    assert found is not None
    assert (found.mean, found.n) == (2.0, 3)  # differences 1, 2, 3: s = 1, t(0.975, 2) = 4.30265
    assert found.half == pytest.approx(4.30265 / 3**0.5, rel=1e-5)
    assert found.text() == "+2.0 [-0.5, +4.5]"
    assert paired({0: 3.0}, {0: 5.5}) == Paired(-2.5, None, 1)
    assert paired({0: 3.0}, {1: 5.5}) is None
    assert paired({0: None}, {0: 5.5}) is None


def test_compare_shows_every_row_beside_the_baseline(write_run: WriteRun) -> None:
    def run(name: str, seed: int, last: float) -> Path:
        return write_run(f"{name}{seed}", name, seed=seed, rows=[(0.0, 0.0), (90.0, 0.0), (last, last)])

    lasts = {"finetune": (10.0, 20.0, 30.0), "disco": (11.0, 22.0, 33.0)}
    runs = [run(name, seed, last) for name, values in lasts.items() for seed, last in enumerate(values)]
    told = compare(runs, baseline="finetune")
    assert told.tables[0].differences == {"disco": paired({0: 11, 1: 22, 2: 33}, {0: 10, 1: 20, 2: 30})}
    assert "| last above finetune (95 %) |" in told.markdown()
    assert "| +2.0 [-0.5, +4.5] |" in told.markdown()
    with pytest.raises(BadInput, match="baseline: unknown 'finetun'"):
        compare(runs, baseline="finetun")
    assert "above" not in compare(runs).markdown()


def test_cells_that_were_not_run_read_so(scripted: Script) -> None:
    states = scripted(finetune=[0], disco=[1, 1], ewc=[75])[0].run()
    compared = comparison(states, "")
    lasts = {v["strategy"]: v["mean"] for v in compared.json()["values"] if v["measure"] == "last"}
    assert lasts == {"finetune": 75.0, "disco": "not completed", "ewc": "not run"}
    assert "1 of 3 cells are not run" in compared.notes


def test_the_page_needs_nothing_else(scripted: Script, tmp_path: Path) -> None:
    states = scripted(finetune=[0], disco=[0])[0].run()
    write_page(tmp_path / "page.html", states, comparison(states, ""))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 1
    assert "2 of 2 cells completed" in page
    assert "fcit-mini-short strategy.name=disco" in page
    assert "http" not in page
    assert "src=" not in page


def test_a_plan_counts_what_is_missing_and_takes_times_from_completed_cells(
    scripted: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = scripted(finetune=[0])[0].run()
    grid = cells("fcit-mini-short", ["strategy.name=finetune,disco", "seed=0,1"])
    monkeypatch.setattr("fedstrata.server.sweeppage._measured", lambda state: 100.0)
    console = Console(width=120, record=True, file=(tmp_path / "told").open("w"))
    with console.file:
        show_plan(look(grid, tmp_path, None), 2, console)
    told = console.export_text()
    assert done[0].result().value("wall_seconds") == 10.5
    assert "3 of 4 cells to run, about 105.2 s with 2 at a time" in told  # (10.5 + 100 + 100) / 2
    assert told.count("completed") == 1


# end to end


@pytest.fixture
def sigterm() -> Iterator[None]:
    """`main` takes the signal over."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def sweep_cli(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["fedstrata", "sweep", *words])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.usefixtures("sigterm")
def test_a_sweep_that_was_stopped_shows_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(self: Sweep) -> None:
        self.folder.mkdir()
        raise Interrupted("stopped")

    monkeypatch.setattr(Sweep, "run", stopped)
    folder, table = tmp_path / "cells", tmp_path / "table.md"
    words = (SMALL[0], "strategy.name=disco", "--dir", str(folder), "--markdown", str(table))
    assert sweep_cli(monkeypatch, *words) == 75
    assert "| disco | 0 | not run |" in table.read_text(encoding="utf-8")
    assert (folder / "sweep.html").is_file()


def hash_of(folder: Path) -> str:
    return str(json.loads((folder / "summary.json").read_text(encoding="utf-8"))["final_state_sha256"])


@pytest.mark.usefixtures("sigterm")
def test_an_interrupted_cell_goes_on_to_the_bits_of_a_plain_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, one = tmp_path / "cells", Worker(tmp_path / "log")
    grid: list[Cell] = cells(SMALL[0], [*SMALL[1:], "strategy.name=disco,finetune"])
    begun = folder / grid[0].name
    begun.parent.mkdir()
    stop = _after_a_round(begun / "events.jsonl", one.interrupt)
    answer = one.run(Job(grid[0].words, str(begun), False, str(folder / "log")))
    stop()
    one.close()
    assert answer.code == 75, answer.reason
    assert [state.status for state in look(grid, folder, None)] == ["begun", "not run"]
    words = (*SMALL, "strategy.name=disco,finetune", "--dir", str(folder), "--json", str(tmp_path / "told.json"))
    assert sweep_cli(monkeypatch, *words) == 0
    launch.run(configure.resolve(SMALL[0], [*SMALL[1:], f"run.dir={tmp_path / 'plain'}"]), Console(quiet=True))
    assert hash_of(begun) == hash_of(tmp_path / "plain")
    told: dict[str, Any] = json.loads((tmp_path / "told.json").read_text(encoding="utf-8"))
    assert [(cell["status"], cell["words"][0]) for cell in told["cells"]] == [("completed", SMALL[0])] * 2
    assert {line["measure"] for line in told["values"]} >= {"last", "difference"}
    assert (folder / "sweep.html").is_file()
    states = look(grid, folder, None)
    assert summary(states, comparison(states, "")) == told


def _after_a_round(events: Path, then: Callable[[], None]) -> Callable[[], None]:
    """Calls `then` once a run has finished a round; returns what waits for that."""

    def watch() -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            if events.is_file() and '"event": "round"' in events.read_text(encoding="utf-8"):
                return then()
            time.sleep(0.02)
        return None

    thread = threading.Thread(target=watch)
    thread.start()
    return thread.join


@pytest.mark.usefixtures("sigterm")
def test_two_jobs_are_held_by_ray_actors_and_end_as_plain_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[int, str]] = []

    def start(cpus: int, address: str) -> None:
        started.append((cpus, address))
        start_ray(cpus, address)

    monkeypatch.setattr(jobs, "start_ray", start)
    monkeypatch.chdir(tmp_path)
    shutil.copy(LIBRARY / "fcit-mini-short.yaml", "mine.yaml")  # found from where the command stands
    words = ("mine.yaml", *SMALL[1:], "strategy.name=disco,finetune", "--dir", "cells", "--results", "kept")
    assert sweep_cli(monkeypatch, *words, "--jobs", "2") == 0
    assert (started, jobs.ray.is_initialized()) == ([(2, "")], False)
    assert len(list((tmp_path / "kept").glob("*.json"))) == 2
    launch.run(configure.resolve("mine.yaml", [*SMALL[1:], f"run.dir={tmp_path / 'plain'}"]), Console(quiet=True))
    assert hash_of(tmp_path / "cells" / "mine-disco-seed0") == hash_of(tmp_path / "plain")
    assert sweep_cli(monkeypatch, *words, "--jobs", "2") == 0  # all is there: no Ray
    assert len(started) == 1


def test_an_actor_that_dies_has_failed_its_job_and_the_next_one_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    job = Job((*SMALL, "federation.rounds_per_stage=4"), str(tmp_path / "run"), False, str(tmp_path / "log"))
    with jobs.hands(tmp_path, 2) as (one, other):
        assert isinstance(one, jobs.Remote)
        waiting = _after_a_round(tmp_path / "run" / "events.jsonl", lambda: jobs.ray.kill(one._actor))
        died = one.run(job)
        waiting()
        assert (died.code, died.reason[:14]) == (1, "its actor died")
        assert one.run(replace(job, resume=True)) == Answer(0)
        other.interrupt()
        assert other.run(job) == Answer(75, "interrupted before it began")
        one.close()
    plain = configure.resolve(SMALL[0], [*job.words[1:], f"run.dir={tmp_path / 'plain'}"])
    launch.run(plain, Console(quiet=True))
    assert hash_of(tmp_path / "run") == hash_of(tmp_path / "plain")


def test_a_run_in_an_actor_is_interrupted_where_it_has_committed(tmp_path: Path) -> None:
    job = Job((*SMALL, "federation.rounds_per_stage=4"), str(tmp_path / "run"), False, str(tmp_path / "log"))
    with jobs.hands(tmp_path, 2) as (one, _):
        waiting = _after_a_round(tmp_path / "run" / "events.jsonl", one.interrupt)
        assert one.run(job).code == 75
        waiting()
        one.close()
    assert json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))["status"] == "interrupted"
