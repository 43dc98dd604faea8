"""What a run will take: planned, refused where it cannot be, and set beside what came of it."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedstrata.core import machine, shapes
from fedstrata.core.config import RunConfig
from fedstrata.core.errors import BadInput
from fedstrata.core.estimate import Shape
from fedstrata.core.machine import PROCESS, Footprint
from fedstrata.server import configure, fitting, launch, plan, preparing
from fedstrata.server.fitting import Memory
from fedstrata.server.grids import InProcessGrid
from fedstrata.server.preparing import actors_of, cohort_size
from fedstrata.server.report import write_report
from fedstrata.server.runfolder import RunFolder

QUIET = Console(quiet=True)
WORDS = ["federation.grid=inprocess", "train.local_epochs=1", "evaluate.split=val", "federation.rounds_per_stage=1"]
FOUR = "federation.clients_per_round=4"
TINY = Shape(hidden=96, intermediate=192, layers=3, heads=4, head=24, vocabulary=1569, picture=16)


def config(*words: str, recipe: str = "fcit-mini-short") -> RunConfig:
    return configure.resolve(recipe, [*WORDS, FOUR, *words])


def planned(*words: str) -> str:
    out = io.StringIO()
    plan.show(config(*words), Console(file=out, width=200))
    return out.getvalue()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch.run(config(f"run.dir={tmp_path_factory.mktemp('runs') / 'run'}"), QUIET)


def summary(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_text(encoding="utf-8")))


# the size of cohorts


def auto(*words: str, recipe: str = "fcit-mini") -> int:
    chosen = config(*words, recipe=recipe)
    return cohort_size(chosen, shapes.layout(chosen), TINY.to_json(), 8)


def test_auto_is_half_of_the_participants_and_at_most_16() -> None:
    assert auto() == 2  # fcit-mini's own bits depend on it
    assert auto("federation.clients_per_round=5") == 3
    many = ["federation.clients=100", "federation.clients_per_round=80", "federation.memory_budget=1000"]
    assert auto(*many) == 16


def test_auto_is_no_more_than_fits_into_the_budget_and_at_least_1() -> None:
    many = ["federation.clients=100", "federation.clients_per_round=80"]
    sizes = [auto(*many, f"federation.memory_budget={budget}") for budget in (1e-3, 0.5, 1, 2, 1000)]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (1, 16)
    assert 1 < sizes[2] < 16
    assert auto(*many, "federation.memory_budget=1", "train.micro_batch=1") > sizes[2]


def test_auto_does_not_depend_on_actors_or_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    many = ["federation.clients=100", "federation.clients_per_round=80", "federation.memory_budget=1"]
    before = auto(*many)
    monkeypatch.setattr(machine, "free_and_total", lambda: (10**9, 10**9))
    monkeypatch.setattr(machine, "gpus", lambda: 8)
    assert auto(*many, "federation.actors=7") == before


def test_what_cannot_be_fused_is_trained_one_at_a_time_and_a_number_is_a_number() -> None:
    assert auto("lora.kind=dora") == 1
    assert auto("federation.cohort_size=7", "federation.memory_budget=0.001") == 7


@pytest.mark.parametrize(
    ("words", "gpus", "actors"),
    [
        (["federation.clients_per_round=20"], 0, 2),
        (["federation.clients_per_round=20"], 1, 1),
        (["federation.clients_per_round=20", "model.device=cpu"], 4, 2),
        (["federation.actors=3"], 1, 3),
        (["federation.clients_per_round=20", "federation.cohort_size=20"], 0, 1),
    ],
)
def test_actors_are_one_per_gpu_else_per_core_and_not_more_than_cohorts(
    monkeypatch: pytest.MonkeyPatch, words: list[str], gpus: int, actors: int
) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: gpus)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert actors_of(config(*words, recipe="fcit-mini")) == actors


# refused before the start


def test_a_run_that_does_not_fit_is_refused_before_its_folder_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "free_and_total", lambda: (50_000_000, 8_000_000_000))
    with pytest.raises(BadInput) as refused:
        launch.run(config(f"run.dir={tmp_path / 'run'}"), QUIET)
    told = str(refused.value)
    assert told.startswith("federation.cohort_size: ")
    for words in ("cpu has 0.05 GB of 8.00 GB left", "federation.cohort_size (2)", "train.micro_batch (8 rows)"):
        assert words in told, words
    assert "federation.actors" not in told  # there is one
    assert not (tmp_path / "run").exists()
    fits = ["federation.cohort_size=1", "train.micro_batch=2", f"run.dir={tmp_path / 'run'}"]
    assert summary(launch.run(config(*fits), QUIET))["status"] == "completed"


def test_a_dry_run_refuses_what_the_run_would_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_and_total", lambda: (500_000_000, 8_000_000_000))
    planned()
    with pytest.raises(BadInput, match=r"4 × a cohort of 2 .* lower .*federation\.actors \(4\)"):
        planned("federation.grid=ray", "federation.actors=4")


def memory(free: int, gpu: bool = False) -> Memory:
    return Memory(10, Footprint("a device", gpu, base=100, private=100 if gpu else 0, free=free, total=10**12))


@pytest.mark.parametrize(
    ("size", "actors", "gpu", "need"),
    [
        (1, 1, False, 10),
        (8, 1, False, 80),
        (8, 3, False, 240 + 2 * PROCESS),  # bases on a CPU are mapped from one file
        (8, 3, True, 240 + 2 * (PROCESS + 100)),
    ],
)
def test_what_a_device_must_hold_beside_what_is_loaded(size: int, actors: int, gpu: bool, need: int) -> None:
    memory(need, gpu).check(config(), size, actors)
    with pytest.raises(BadInput, match="a device has"):
        memory(need - 1, gpu).check(config(), size, actors)


def test_clients_that_are_trained_one_at_a_time_are_in_memory_one_at_a_time() -> None:
    assert Memory(10, Footprint(base=100, gpu=True, process=7), fused=False).actor(16) == 110
    assert Memory(10, Footprint(base=100, gpu=True, process=7)).actor(16) == 260
    assert Memory(10, Footprint(base=100, process=700)).actor(16) == 860  # the process holds its base


def test_a_machine_that_tells_nothing_refuses_nothing() -> None:
    Memory(10**15, Footprint()).check(config(), 16, 16)


def test_actors_share_the_gpus_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: 4)
    assert fitting.on_one_device(config(), 6, Footprint(gpu=True)) == 2
    assert fitting.on_one_device(config(), 6, Footprint()) == 6
    assert fitting.on_one_device(config("federation.ray_address=auto"), 6, Footprint()) == 1


def test_rows_are_taken_to_be_as_long_as_the_data_say() -> None:
    prepared = preparing.prepare(config())
    length, answer = fitting.longest(prepared.scenario, 16, 0)
    rows = [example for task in prepared.scenario.tasks for example in task.train]
    tokenizer = shapes.tokenizer("tiny")
    tokens = max(len(tokenizer(f"{e.question} {e.answer}")["input_ids"]) for e in rows) + 16
    assert tokens < length < 200 < config().train.max_length
    assert max(len(tokenizer(e.answer)["input_ids"]) for e in rows) <= answer < 40
    assert fitting.longest(prepared.scenario, 576, 30)[0] == length + 560 + 30
    prepared.close()


# printed, written down, compared


def test_a_dry_run_says_what_the_run_will_take() -> None:
    said = planned("federation.grid=ray", "federation.actors=2")
    assert "2 actors on cpu · cohorts of 2 · 2 a round" in said
    assert re.search(r"memory of an actor: about [\d.]+ .B \(base 3\.5 MB, cohort at most [\d.]+ MB\)", said)
    assert re.search(r"predicted time: about [\d.]+ s", said)


@pytest.mark.parametrize(
    "words",
    [["strategy.name=scaffold"], ["strategy.name=ewc"], ["strategy.name=olora"], ["federation.upload=int8"]],
)
def test_what_methods_send_beside_the_adapter_is_planned_to_the_byte(words: list[str], tmp_path: Path) -> None:
    moved = summary(launch.run(config(*words, f"run.dir={tmp_path / 'run'}"), QUIET))["plan"]
    for name in ("bytes_up", "bytes_down", "bytes_eval"):
        assert moved[name]["planned"] == moved[name]["actual"] > 0, name


def test_the_planned_steps_are_those_that_clients_make(done: Path) -> None:
    events = RunFolder(done).events()
    made = sum(row["steps"] for event in events if event["event"] == "round" for row in event["participants"])
    assert events[0]["plan"]["steps"] == made
    assert events[0]["plan"]["scorings"] == len([event for event in events if event["event"] == "stage_scored"])


@pytest.mark.parametrize("strategy", ["joint", "finetune"])
def test_a_pooled_methods_steps_are_planned_too(strategy: str) -> None:
    prepared = preparing.prepare(config(f"strategy.name={strategy}"))
    assert plan.plan_of(prepared).steps > 0
    prepared.close()


def test_a_run_sets_its_plan_beside_what_came_of_it(done: Path) -> None:
    told = summary(done)["plan"]
    assert (told["actors"], told["cohort_size"], told["cohorts"], told["device"]) == (1, 2, 2, "cpu")
    for name in ("bytes_up", "bytes_down", "bytes_eval"):
        assert told[name]["planned"] == told[name]["actual"] == summary(done)[name] > 0
    assert told["actor_memory"]["actual"] > 10**8
    predicted = [event for event in RunFolder(done).events() if event["event"] == "time_predicted"]
    assert [event["seconds"] for event in predicted] == [told["seconds"]["planned"]]
    assert told["seconds"]["actual"] == summary(done)["wall_seconds"]
    assert (summary(done)["cohort_size"], summary(done)["cohort_shrunk"]) == (2, 0)


def test_the_report_shows_planned_and_actual(done: Path) -> None:
    page = write_report(done).read_text(encoding="utf-8")
    table = page[page.index("Planned and actual") :]
    words = re.sub(r"<[^>]+>|\s+", " ", table[: table.index("</table>")])
    assert re.search(r"bytes up +([\d.]+ \wB) +\1 ", words)
    assert "memory of an actor" in words
    assert "time" in words


def test_an_unfinished_run_shows_its_plan_with_what_it_took_so_far(done: Path, tmp_path: Path) -> None:
    for name in ("config.yaml", "matrix.json"):
        (tmp_path / name).write_bytes((done / name).read_bytes())
    lines = (done / "events.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "events.jsonl").write_text("".join(lines[:-1]), encoding="utf-8")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Planned and actual" in page


def test_another_grid_is_left_as_it_is() -> None:
    grid = InProcessGrid(2, 4)
    fitting.resize(grid, 8)
    assert grid.cohort_size == 4
    fitting.resize(grid, 3)
    assert grid.cohort_size == 3
