"""`fedstrata bench`: names, tables, files and what it refuses."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fedstrata.benchmarks import NAMES
from fedstrata.benchmarks.measure import Cost, Result, cost, paired, ratios
from fedstrata.benchmarks.table import page
from fedstrata.core.errors import BadInput
from fedstrata.server import bench as benches
from fedstrata.server import cli

TOY = Result(
    name="toy",
    what="adding",
    clock="cpu",
    ratios={"slow": 3.0, "slower": 8.0},
    targets={"slow": 4, "slower": 8, "size": 1.5},
    limits={"size": 1.25},
    equal={"sum": 0.0},
    notes=("a note",),
)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark that takes no time."""
    module = ModuleType("fedstrata.benchmarks.toy_one")
    module.bench = lambda: TOY  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fedstrata.benchmarks.toy_one", module)
    monkeypatch.setitem(NAMES, "toy-one", "a toy")


def test_rows_say_what_was_aimed_at_and_reached() -> None:
    assert benches.rows(TOY.json()) == [
        ("slow", "3 ×", "≥ 4 ×", "NO"),
        ("slower", "8 ×", "≥ 8 ×", "yes"),
        ("size", "1.25", "≤ 1.5", "yes"),
    ]


@pytest.mark.usefixtures("toy")
def test_the_command_prints_a_table_and_writes_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fedstrata", "bench", "toy-one", "--json", str(tmp_path / "toy.json")])
    cli.main()
    assert "a note" in capsys.readouterr().out
    told = json.loads((tmp_path / "toy.json").read_text())
    assert told["ratio"] == 3.0
    assert told["ratios"] == {"slow": 3.0, "slower": 8.0}
    assert told["limits"] == {"size": 1.25}
    assert told["machine"]["cores"] >= 1


def test_without_a_name_the_benchmarks_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fedstrata", "bench"])
    cli.main()
    out = capsys.readouterr().out
    assert all(name in out for name in NAMES)


def test_an_unknown_name_is_bad_input() -> None:
    with pytest.raises(BadInput, match="did you mean 'e2e'"):
        benches.measure("e2")


@pytest.mark.usefixtures("toy")
def test_what_a_benchmark_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fedstrata.benchmarks.toy_one", None)
    with pytest.raises(BadInput, match="bench toy-one: needs the package"):
        benches.measure("toy-one")


@pytest.mark.parametrize("name", NAMES)
def test_every_name_has_a_module(name: str) -> None:
    file = Path(benches.__file__).parents[1] / "benchmarks" / f"{name.replace('-', '_')}.py"
    assert "def bench(" in file.read_text(encoding="utf-8")


def test_sides_run_turn_by_turn() -> None:
    ran: list[str] = []
    found = paired({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, repeats=3, warm=1)
    assert ran == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert [list(costs) for costs in found] == [["a", "b"]] * 3


def test_a_ratio_is_the_median_of_pairs() -> None:
    found = [{"ours": Cost(1.0, 2.0), "theirs": Cost(x, 2.0)} for x in (2.0, 9.0, 3.0)]
    assert ratios(found, "ours", "cpu") == {"theirs": 3.0}
    assert ratios(found, "ours", "wall") == {"theirs": 1.0}


def test_cost_counts_this_process() -> None:
    spent = cost(lambda: sum(range(2_000_000)))
    assert 0 < spent.cpu < 10
    assert spent.wall > 0


def test_the_page_has_every_benchmark(tmp_path: Path) -> None:
    (tmp_path / "grid.json").write_text(json.dumps({**TOY.json(), "name": "grid"}), encoding="utf-8")
    text = page(tmp_path)
    assert "| slower | 8 × | ≥ 8 × | yes |" in text
    assert text.count("Not run.") == len(NAMES) - 1
