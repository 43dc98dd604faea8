"""The command line: `fedstrata run | sweep | preview | resume | compare | report | list | export | ask | …`.

Exit codes: 0 completed, 1 failed, 2 bad input (one clear message, no traceback), 75 interrupted and resumable.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from fedstrata.core.errors import BadInput, FedstrataError, Interrupted
from fedstrata.server import guard
from fedstrata.server.deploying import deploy

cli = typer.Typer(add_completion=False, no_args_is_help=True, help="Federated continual instruction tuning.")
cli.add_typer(deploy, name="deploy")
console = Console()
CTRL_C = 130  # what typer makes of a KeyboardInterrupt that nobody has caught

Words = Annotated[list[str] | None, typer.Argument(help="A recipe (optional), then key=value words.")]
RunDir = Annotated[Path, typer.Argument(help="A run folder.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result as JSON.")]


@cli.command()
def run(
    words: Words = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print config, schedule and bytes; train nothing.")
    ] = False,
    json_: Json = None,
) -> None:
    """Run a federation; without words: the embedded default (fcit-mini, homogeneous, DISCO)."""
    from fedstrata.server import configure, launch, plan

    recipe, overrides = configure.split_recipe(words or [])
    config = configure.resolve(recipe, overrides)
    if dry_run:
        plan.show(config, console)
        return
    show(launch.run(config, console), json_)


@cli.command()
def preview(
    words: Words = None,
    html: Annotated[Path | None, typer.Option(help="Also write one self-contained page.")] = None,
    png: Annotated[Path | None, typer.Option(help="Also write the client × stage heat map as a picture.")] = None,
    partition: Annotated[
        Path | None, typer.Option(help="Also save who holds which row, for partition kind file.")
    ] = None,
    json_: Json = None,
) -> None:
    """Show a scenario before any model is loaded: who holds what when, labels, lengths, faults, steps and bytes."""
    from fedstrata.server import configure, previewpage
    from fedstrata.server.preview import preview as look

    told, scenario = look(configure.resolve(*configure.split_recipe(words or [])))
    previewpage.show(told, console)
    for path, write in ((html, previewpage.save_html), (png, previewpage.save_png)):
        if path:
            write(told, path)
    if partition:
        scenario.save_partition(partition)
    write_json(json_, told.json())


@cli.command()
def resume(
    run_dir: RunDir,
    words: Annotated[
        list[str] | None, typer.Argument(help="key=value words that change how fast it runs (federation.actors=…).")
    ] = None,
    from_stage: Annotated[
        int | None, typer.Option(min=1, help="Go back to the start of this stage; what came later is dropped.")
    ] = None,
    json_: Json = None,
) -> None:
    """Go on with a run that was stopped, from its last committed round."""
    from fedstrata.server import launch

    show(launch.resume(run_dir, console, words=words or (), from_stage=from_stage), json_)


def show(folder: Path, json_: Path | None) -> None:
    """The table at the end of a run; as JSON: its summary."""
    from fedstrata.server.report import matrix_table, summary_lines
    from fedstrata.server.runfolder import RunFolder

    finished = RunFolder(folder)
    console.print(matrix_table(finished.matrix))
    for line in summary_lines(finished.summary):
        console.print(line, highlight=False, markup=False)
    write_json(json_, finished.summary)
    console.print(f"run folder: {folder}   report: {folder / 'report.html'}", highlight=False, soft_wrap=True)


@cli.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders or result JSON files.")],
    baseline: Annotated[str, typer.Option(help="A row: the others' last beside it, seed by seed.")] = "",
    markdown: Annotated[Path | None, typer.Option(help="Also write the tables as Markdown.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Also write the rows as CSV.")] = None,
    json_: Json = None,
) -> None:
    """Strategies side by side: mean ± std over seeds; written as compare.md and compare.csv unless named otherwise."""
    from fedstrata.server.compare import compare as build
    from fedstrata.strategies import STRATEGIES

    comparison = build(runs, {name: vars(kind.config_type()) for name, kind in STRATEGIES.items()}, baseline)
    console.print(comparison.table())
    (markdown or Path("compare.md")).write_text(comparison.markdown(), encoding="utf-8")
    (csv or Path("compare.csv")).write_text(comparison.csv(), encoding="utf-8")
    write_json(json_, comparison.json())
    console.print(f"written: {markdown or 'compare.md'}, {csv or 'compare.csv'}", highlight=False)


@cli.command()
def sweep(
    words: Annotated[
        list[str] | None, typer.Argument(help="A recipe or a sweep file (optional), then key=value,value words.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the cells and the time they take; run none.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time; more than one: each held by a Ray actor.")] = 1,
    dir_: Annotated[Path, typer.Option("--dir", help="Where the run folders are.")] = Path("runs/sweep"),
    results: Annotated[
        Path | None, typer.Option(help="Also one JSON per cell; cells that are there are skipped.")
    ] = None,
    baseline: Annotated[str, typer.Option(help="A row: the others' last beside it, seed by seed.")] = "",
    markdown: Annotated[Path | None, typer.Option(help="Also write the tables as Markdown.")] = None,
    html: Annotated[Path | None, typer.Option(help="The page with curves; sweep.html in --dir unless named.")] = None,
    json_: Json = None,
) -> None:
    """Run strategies × seeds × scenarios × any config keys; goes on where it was stopped. One table, one page."""
    from fedstrata.server import cells, configure, sweeppage
    from fedstrata.server import sweep as sweeping

    states = sweeping.look(cells.cells(*configure.split_recipe(words or [])), dir_, results)
    if dry_run:
        sweeppage.show_plan(states, jobs, console)
        return
    sweeppage.comparison(states, baseline)  # a baseline that is no row is told before anything is run

    def tell(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    running = sweeping.Sweep(states, dir_, results, jobs, tell)
    try:
        running.run()
    finally:  # a sweep that was stopped shows what it has
        states = list(running.states.values())
        compared = sweeppage.comparison(states, baseline)
        console.print(compared.table())
        sweeppage.write_page(html or dir_ / "sweep.html", states, compared)
        if markdown:
            markdown.write_text(compared.markdown(), encoding="utf-8")
        write_json(json_, sweeppage.summary(states, compared))
    tell(f"run folders: {dir_}   page: {html or dir_ / 'sweep.html'}")
    sweeping.check(states)


@cli.command()
def report(run_dir: RunDir) -> None:
    """Rebuild report.html from the run folder alone."""
    from fedstrata.server.report import write_report

    console.print(str(write_report(run_dir)), highlight=False, soft_wrap=True)


@cli.command(name="list")
def list_(what: Annotated[str, typer.Argument(help="strategies, scenarios or models; empty: all.")] = "") -> None:
    """What is there to choose from."""
    from fedstrata.server import catalogue

    catalogue.show(what, console)


@cli.command()
def export(
    run_dir: RunDir, to: Annotated[Path, typer.Option(help="A new folder for the PEFT adapters and the router.")]
) -> None:
    """One PEFT folder per subspace, and the router: tokens, τ, ε, encoder, base id and hash."""
    from fedstrata.server.export import export as write

    console.print(f"exported: {', '.join(write(run_dir, to))} to {to}", highlight=False, soft_wrap=True)


@cli.command()
def ask(
    run_dir: RunDir,
    text: Annotated[str, typer.Argument(help="The instruction.")],
    image: Annotated[Path | None, typer.Option(help="A picture for it.")] = None,
    json_: Json = None,
) -> None:
    """Answer one instruction with a run's knowledge; prints the answer and the weights α of the subspaces."""
    from fedstrata.server.ask import ask as answer

    reply = answer(run_dir, text, image)
    console.print(reply.text, highlight=False, markup=False)
    for name, weight in reply.weights:
        console.print(f"  α {weight:.3f}  {name}", highlight=False, markup=False)
    write_json(json_, {"answer": reply.text, "weights": dict(reply.weights)})


@cli.command()
def bench(
    name: Annotated[str, typer.Argument(help="A benchmark; without one: what there is.")] = "",
    json_: Json = None,
) -> None:
    """Measure fedstrata side by side with what others do."""
    from fedstrata.server import bench as benches

    if not name:
        for known, what in benches.names().items():
            console.print(f"{known:14s} {what}", highlight=False)
        return
    result = benches.measure(name)
    benches.show(result, console)
    write_json(json_, result)


def write_json(path: Path | None, result: object) -> None:
    """`--json FILE`."""
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """The console script. SIGTERM, which a batch system or `docker stop` sends, ends a run as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    end(code(guarded=sys.argv[1:2] in (["run"], ["resume"])))


def code(guarded: bool = False) -> int:
    """Does what the command line says; its exit code. guarded: the run is a process of its own below this one."""
    try:
        if guarded:
            guard.begin()
        stopped = cli(standalone_mode=False)
        if stopped == CTRL_C:
            raise Interrupted("interrupted before it began; the same command begins it again")
    except SystemExit as stop:  # the command's, above a run; click's, where nobody reads what it prints
        return stop.code if isinstance(stop.code, int) else FedstrataError.exit_code
    except FedstrataError as error:
        Console(stderr=True).print(f"[bold red]{_title(error)}[/bold red] {escape(str(error))}", soft_wrap=True)
        return error.exit_code
    except KeyboardInterrupt:
        return Interrupted.exit_code
    except Exception as error:
        return _other(error)
    return stopped or 0


def end(code: int) -> None:
    """Ends the process; at once where a dead Ray was left behind, whose own end would be another code."""
    guard.tell(code=code)
    raystart = sys.modules.get("fedstrata.server.raystart")
    if raystart and raystart.ABANDONED.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def _title(error: FedstrataError) -> str:
    return "bad input:" if isinstance(error, BadInput) else "failed:"


def _other(error: Exception) -> int:
    """Usage errors of the command line itself are bad input too; the rest is a bug and shows its traceback."""
    import click

    if isinstance(error, click.ClickException):
        error.show()
        return BadInput.exit_code
    sys.excepthook(type(error), error, error.__traceback__)
    return FedstrataError.exit_code
