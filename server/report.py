"""`report.html`: one self-contained page, rebuilt from a run folder alone; and the table at the end of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich import box
from rich.table import Table
from rich.text import Text

from fedstrata.core.metrics import AccuracyMatrix
from fedstrata.server import privacy, provenance
from fedstrata.server.planned import FIGURES, compare
from fedstrata.server.runfolder import MATRIX, REPORT, SUMMARY, RunFolder

UNDEFINED = "–"
SCORES = ("last", "avg", "forgetting", "bwt", "fwt")


def write_report(run_dir: Path) -> Path:
    """Writes `run_dir/report.html` and returns its path; the same folder gives the same bytes.

    A run that was interrupted has no summary and perhaps no matrix: the page says so and shows what is there.

    Raises:
        BadInput: not a run folder, or one of its files is broken.
    """
    folder = RunFolder(run_dir)
    page = environment().get_template("report.html.j2").render(**_context(folder))
    half = folder.path / f".{REPORT}.part"
    half.write_text(page, encoding="utf-8")
    half.replace(folder.path / REPORT)
    return folder.path / REPORT


def matrix_table(matrix: AccuracyMatrix) -> Table:
    """Task × stage: one row a task, one column a scored stage (0: before training); not yet trained cells are dim.

    Metrics other than exact_match are named below it.
    """
    scored: dict[str, list[str]] = {}
    for task, metric in zip(matrix.tasks, matrix.metrics, strict=True):
        scored.setdefault(metric, []).append(task)
    named = [f"{metric}: {', '.join(tasks)}" for metric, tasks in scored.items() if metric != "exact_match"]
    lines = ["stage 0: before training; dim: task not yet trained", *named]
    table = Table(box=box.SIMPLE_HEAD, caption="\n".join(lines))
    table.add_column("task")
    for t in range(len(matrix.scores)):
        table.add_column(str(t), justify="right")
    for i, task in enumerate(matrix.tasks):
        cells = zip(matrix.scores, matrix.seen, strict=True)
        row = [Text(f"{scores[i]:.1f}", style="bold" if seen[i] else "dim") for scores, seen in cells]
        table.add_row(Text(task), *row)
    return table


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """What a run came to, as plain lines for the terminal (no markup in them)."""
    numbers = [*SCORES, "routing_accuracy", "vocabulary_rate"]
    words = [f"{name} {number(summary.get(name))}" for name in numbers if summary.get(name) is not None]
    sizes = [f"{name} {human_bytes(summary.get('bytes_' + name))}" for name in ("up", "down", "eval")]
    times = [f"{name} {human_seconds(summary.get(name + '_seconds'))}" for name in ("train", "wall")]
    lines = ["  ".join(words) or "no scores yet", "bytes " + "  ".join(sizes), "time " + "  ".join(times)]
    if summary.get("skipped_rounds"):
        lines.append(f"skipped rounds {summary['skipped_rounds']}")
    return [*lines, *privacy.lines(summary)]


def number(value: float | None) -> str:
    """One decimal; undefined is a dash."""
    return UNDEFINED if value is None else f"{value:.1f}"


def human_bytes(count: float | None) -> str:
    """Decimal units, as networks are measured.

    >>> human_bytes(1_234_567)
    '1.23 MB'
    """
    if count is None:
        return UNDEFINED
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 999.5 * size else f"{count / size:.0f} {unit}"
    return f"{count:.0f} B"


def human_seconds(seconds: float | None) -> str:
    """Seconds below two minutes, then minutes and seconds, then hours and minutes.

    >>> human_seconds(150)
    '2 min 30 s'
    """
    if seconds is None:
        return UNDEFINED
    if seconds < 120:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60:02} s" if whole < 7200 else f"{whole // 3600} h {whole % 3600 // 60:02} min"


def environment() -> Environment:
    """Templates beside this file; everything they show is escaped."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "size": human_bytes, "duration": human_seconds}
    return environment


def _context(folder: RunFolder) -> dict[str, Any]:
    """Everything the template shows, as plain values."""
    events = folder.events()
    matrix = folder.matrix if folder.has(MATRIX) else None
    ended = folder.has(SUMMARY)
    subspaces = provenance.origins(events)
    stages = provenance.costs(events)
    summary = folder.summary if ended else _unfinished(matrix, stages, provenance.rounds(events))
    return {
        "config": yaml.safe_dump(folder.config, sort_keys=False, allow_unicode=True),
        "strategy": _section(folder.config, "strategy").get("name", UNDEFINED),
        "scenario": _section(folder.config, "scenario").get("name", UNDEFINED),
        "seed": folder.config.get("seed", UNDEFINED),
        "identity": _identity(events),
        "ended": ended,
        "summary": summary,
        "headline": _headline(summary, matrix),
        "privacy": privacy.lines(summary),
        "matrix": matrix,
        "beside": _beside(events),
        "subspaces": subspaces,
        "routing": _routing(events, provenance.homes(subspaces)),
        "cosines": _cosines(events),
        "stages": stages,
        "planned": _planned(summary, events),
        "rejected": provenance.rejections(events),
        "skipped": [told for told in provenance.rounds(events) if told.get("skipped")],
        "figures": _figures(matrix, events),
    }


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}


def _identity(events: Sequence[provenance.Event]) -> str:
    used = provenance.first(events, "run_started").get("uses_task_identity")
    return "unknown" if used is None else "yes" if used else "no"


def _unfinished(
    matrix: AccuracyMatrix | None, stages: Sequence[provenance.Cost], rounds: Sequence[provenance.Event]
) -> dict[str, Any]:
    """A summary of what an interrupted run has so far; what only the end of a run can tell stays undefined."""
    scores = {name: getattr(matrix, name) if matrix else None for name in (*SCORES, "vocabulary_rate")}
    totals = {
        name: sum(getattr(cost, name) for cost in stages)
        for name in ("bytes_up", "bytes_down", "bytes_eval", "train_seconds")
    }
    skipped = sum(bool(told.get("skipped")) for told in rounds)
    wall = sum(cost.seconds + cost.scoring for cost in stages)
    return {"status": "not finished", **scores, **totals, "skipped_rounds": skipped, "wall_seconds": wall}


def _headline(summary: Mapping[str, Any], matrix: AccuracyMatrix | None) -> list[tuple[str, str]]:
    """(name, value) of the numbers at the top."""
    rate = summary.get("vocabulary_rate", matrix.vocabulary_rate if matrix else None)
    scores = [(name, number(summary.get(name))) for name in SCORES]
    rates = [("routing accuracy", number(summary.get("routing_accuracy"))), ("vocabulary rate", number(rate))]
    sizes = [(f"bytes {name}", human_bytes(summary.get(f"bytes_{name}"))) for name in ("up", "down", "eval")]
    times = [(f"{name} time", human_seconds(summary.get(f"{name}_seconds"))) for name in ("train", "wall")]
    return [*scores, *rates, *sizes, *times]


def _planned(summary: Mapping[str, Any], events: Sequence[provenance.Event]) -> list[tuple[str, str, str]]:
    """(name, planned, actual); a run that has not ended has its actuals in the summary of what is there so far."""
    so_far = {**summary, "seconds": summary.get("wall_seconds")}
    plan = summary.get("plan") or compare(events, so_far)
    labels = {"actor_memory": "memory of an actor", "server_memory": "memory of the server", "seconds": "time"}
    rows = []
    for name in (name for name in FIGURES if name in plan):
        label, unit = labels.get(name, name.replace("_", " ")), human_seconds if name == "seconds" else human_bytes
        rows.append((label, unit(plan[name]["planned"]), unit(plan[name]["actual"])))
    return rows


def _beside(events: Sequence[provenance.Event]) -> Mapping[str, Mapping[str, float]]:
    """Task → {metric: score} of the metrics beside the task's own, after the last scored stage."""
    told = provenance.scorings(events)
    return (told[-1].get("beside") or {}) if told else {}


def _routing(events: Sequence[provenance.Event], homes: Mapping[str, int]) -> list[dict[str, Any]]:
    """Per task, after the last scored stage: hits per subspace, the task's home and the share routed there."""
    scored = [told["routing"] for told in provenance.scorings(events) if told.get("routing")]
    return [
        {"task": task, "hits": hits, "home": homes.get(task), "share": provenance.routed_home(hits, homes.get(task))}
        for task, hits in (scored[-1] if scored else {}).items()
    ]


def _cosines(events: Sequence[provenance.Event]) -> list[dict[str, Any]]:
    """Per stage the values of identity tokens' cosines within and between subspaces (None values left out)."""
    told = [(event["stage"], event["cosines"]) for event in provenance.scorings(events) if event.get("cosines")]
    kinds = ("within", "between")
    rows = [{"stage": s, **{k: [v for v in c.get(k) or () if v is not None] for k in kinds}} for s, c in told]
    return [row for row in rows if row["within"] or row["between"]]


def _figures(matrix: AccuracyMatrix | None, events: Sequence[provenance.Event]) -> dict[str, Markup]:
    """Name → <svg>; only those there is something to draw for."""
    from fedstrata.server import figures  # here: matplotlib takes long to import, and tables need none of it

    drawn: dict[str, Markup] = {}
    if matrix is not None and matrix.scores:  # matplotlib escapes what it writes, so its SVG is safe as it is
        drawn["matrix"], drawn["curves"] = Markup(figures.heat_map(matrix)), Markup(figures.curves(matrix))
    if rows := _cosines(events):
        values = [[row[name] for row in rows] for name in ("stage", "within", "between")]
        drawn["cosines"] = Markup(figures.cosines(*values))
    return drawn
