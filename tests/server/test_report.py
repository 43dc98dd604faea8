"""The report: what it shows, that it holds no markup of the run's own, and what it says about unfinished runs."""

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from fedstrata.core.errors import BadInput
from fedstrata.server import provenance
from fedstrata.server.report import human_bytes, human_seconds, matrix_table, summary_lines, write_report
from fedstrata.server.runfolder import RunFolder

WriteRun = Callable[..., Path]


class Words(HTMLParser):
    """The page's visible text and the names of its tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self._texts: list[str] = []
        self.feed(page)
        self.text = re.sub(r"\s+", " ", " ".join(self._texts))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self._texts.append(data)


def page_of(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def test_the_report_shows_the_numbers_and_where_they_came_from(write_run: WriteRun) -> None:
    text = Words(page_of(write_run())).text
    for words in (
        "status: completed",
        "uses task identity: no",
        "last 75.0",
        "forgetting 10.0",
        "routing accuracy 94.0",
        "vocabulary rate 96.0",
        "bytes up 3 kB",
        "wall time 10.5 s",
        "0 stage 1, round 1 names 101 3, 5 2",
        "1 stage 2, round 1 charts 30 3 1",
        "names 98.0 % 49 1",
        "charts 90.0 % 5 45",
        "2 0.97 0.98 0.25 0.25",
        "client 7 rejected: not finite",
        "round skipped",
        "beta: null",
    ):
        assert words in text, words


def test_the_report_is_self_contained_and_the_same_every_time(write_run: WriteRun) -> None:
    run = write_run()
    page = page_of(run)
    assert page == page_of(run)
    assert not re.search(r"https?:|\bsrc=|<link|<script|@import|url\((?!#)", page)
    assert page.count("<svg") == 3
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert [path.name for path in run.iterdir() if "report" in path.name] == ["report.html"]


def test_every_task_names_its_metric_and_further_ones_have_a_table(write_run: WriteRun) -> None:
    run = write_run()
    assert "Other metrics" not in Words(page_of(run)).text
    events = RunFolder(run).events()
    events[-2]["beside"] = {"charts": {"cider": 81.25, "<b>": 3.0}}  # the last stage's scores
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    text = Words(page_of(run)).text
    assert "names exact_match 50 80.0 96.0" in text
    assert "Other metrics task metric last charts cider 81.2 charts <b> 3.0" in text


def test_markup_in_names_and_config_is_shown_and_not_run(write_run: WriteRun) -> None:
    evil = "<script>alert('$x$')</script>"
    run = write_run(tasks=(evil, "_b"), config={"model": {"name": evil}}, summary={"status": evil})
    page = page_of(run)
    assert "script" not in Words(page).tags
    assert evil in Words(page).text


def test_a_run_without_summary_says_so_and_adds_up_what_is_there(write_run: WriteRun) -> None:
    text = Words(page_of(write_run(ended=False, rows=[(0.0, 10.0), (90.0, 20.0)]))).text
    assert "This run has not finished: there is no summary.json. What follows covers 1 of 2 stages" in text
    assert "status: not finished" in text
    assert "last 90.0" in text
    assert "bytes up 3 kB" in text


def test_a_folder_that_only_just_began_still_gives_a_page(write_run: WriteRun) -> None:
    run = write_run(ended=False)
    (run / "matrix.json").unlink()
    (run / "events.jsonl").unlink()
    text = Words(page_of(run)).text
    assert "no stage has been scored yet" in text
    assert "uses task identity: unknown" in text
    assert "No round has been recorded" in text


def test_an_interrupted_run_with_a_summary_names_its_status(write_run: WriteRun) -> None:
    text = Words(page_of(write_run(summary={"status": "interrupted", "last": None}, rows=[(0.0, 10.0)]))).text
    assert "This run was not completed (status: interrupted). What follows covers 0 of 2 stages." in text
    assert "last –" in text


def test_a_broken_file_stops_the_report_and_leaves_none(write_run: WriteRun) -> None:
    run = write_run()
    (run / "matrix.json").write_text("{", encoding="utf-8")
    with pytest.raises(BadInput, match=r"matrix\.json"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_a_method_without_subspaces_has_a_page_too(write_run: WriteRun) -> None:
    run = write_run(strategy="finetune")
    events = [event for event in RunFolder(run).events() if event["event"] in ("run_started", "run_finished")]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    text = Words(page_of(run)).text
    assert "No subspace was named" in text
    assert "Identity tokens" not in text


def test_a_resumed_run_counts_a_repeated_round_once(write_run: WriteRun) -> None:
    events = RunFolder(write_run()).events()
    repeated = events[:4] + events[2:]
    assert provenance.costs(repeated) == provenance.costs(events)
    assert provenance.origins(repeated) == provenance.origins(events)
    assert [cost.bytes_up for cost in provenance.costs(events)] == [0, 2000, 1000]


def test_a_tasks_home_is_where_most_of_its_samples_went() -> None:
    first, second = provenance.Origin(0), provenance.Origin(1)
    first.samples.update({"a": 10, "b": 5})
    second.samples.update({"a": 10, "b": 6, "c": 1})
    homes = provenance.homes([first, second])
    assert homes == {"a": 0, "b": 1, "c": 1}
    assert provenance.routed_home([3, 1], 1) == 25.0
    assert provenance.routed_home([4], 1) == 0.0
    assert provenance.routed_home([0, 0], 1) is None


def test_the_terminal_table_has_a_row_per_task_and_a_column_per_stage(write_run: WriteRun) -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(matrix_table(RunFolder(write_run(tasks=("[red]names", "charts"))).matrix))
    out = console.file.getvalue()  # type: ignore[attr-defined]
    rows = [line.split() for line in out.splitlines() if line.strip()]
    assert rows[0] == ["task", "0", "1", "2"]
    assert ["[red]names", "0.0", "90.0", "80.0"] in rows
    assert ["charts", "10.0", "20.0", "70.0"] in rows


def test_the_terminal_table_names_metrics_other_than_exact_match(write_run: WriteRun) -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(matrix_table(replace(RunFolder(write_run()).matrix, metrics=("exact_match", "iou"))))
    rows = [line.split() for line in console.file.getvalue().splitlines() if line.strip()]  # type: ignore[attr-defined]
    assert rows[0] == ["task", "0", "1", "2"]
    assert rows[-1] == ["iou:", "charts"]


def test_summary_lines_are_plain_and_leave_out_what_is_undefined(write_run: WriteRun) -> None:
    summary = RunFolder(write_run(summary={"fwt": None})).summary
    assert summary_lines(summary) == [
        "last 75.0  avg 82.5  forgetting 10.0  bwt -10.0  routing_accuracy 94.0",
        "bytes up 3 kB  down 6 kB  eval 1.5 kB",
        "time train 3.0 s  wall 10.5 s",
        "skipped rounds 1",
    ]


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "–"), (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_999, "1000 kB"), (12_345_678, "12.3 MB")],
)
def test_bytes_for_people(count: int | None, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(None, "–"), (1.25, "1.2 s"), (119.96, "120.0 s"), (7260, "2 h 01 min")])
def test_seconds_for_people(seconds: float | None, text: str) -> None:
    assert human_seconds(seconds) == text


def test_what_was_planned_stands_beside_what_came(write_run: WriteRun) -> None:
    sizes = {name: {"planned": 3000, "actual": 2500} for name in ("bytes_up", "bytes_down", "bytes_eval")}
    plan = {
        **sizes,
        "actor_memory": {"planned": 420_000_000, "actual": None},
        "seconds": {"planned": 9, "actual": 10.5},
    }
    text = Words(page_of(write_run(summary={"plan": plan}))).text
    assert "planned actual bytes up 3 kB 2.5 kB bytes down 3 kB 2.5 kB bytes eval 3 kB 2.5 kB" in text
    assert "memory of an actor 420 MB – time 9.0 s 10.5 s" in text


@pytest.mark.parametrize("summary", [{}, {"plan": {}}])
def test_a_run_without_a_plan_has_no_such_table(write_run: WriteRun, summary: dict[str, object]) -> None:
    assert "planned" not in Words(page_of(write_run(summary=summary))).text
