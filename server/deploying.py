"""`fedstrata deploy …`: the commands of a deployment; what they do is in `server/deploy*.py` and `client/`."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from fedstrata.core.errors import FedstrataError

deploy = typer.Typer(no_args_is_help=True, help="A deployment: real clients that keep their own data (docs/deploy.md).")
console = Console()

Insecure = Annotated[bool, typer.Option("--insecure", help="Without TLS and node keys; on one host, for tests.")]


@deploy.command()
def keys(
    to: Annotated[Path, typer.Option(help="The folder of keys; one folder per party in it.")],
    clients: Annotated[int, typer.Option(help="How many clients there are.")] = 3,
    host: Annotated[
        list[str] | None, typer.Option(help="A further name or address of server and gate; repeatable.")
    ] = None,
    rotate: Annotated[str, typer.Option(help="server, gate or client-K: replace its key.")] = "",
) -> None:
    """Make the authority, certificates and node keys; what is there is kept, unless it is to be rotated."""
    from fedstrata.server import deploykeys

    made = deploykeys.make(to, clients, host or (), rotate)
    console.print(f"{to}: made {', '.join(made)}" if made else f"{to}: all there, nothing made", highlight=False)


@deploy.command()
def run(
    words: Annotated[list[str] | None, typer.Argument(help="As for `fedstrata run`; run.dir is needed.")] = None,
    attempts: Annotated[int, typer.Option(help="How many Flower runs may be needed.")] = 3,
    insecure: Insecure = False,
) -> None:
    """Submit a run to the SuperLink, watch it, and go on with a new one from the last commit when it dies."""
    from fedstrata.server import cli, configure, deployflower, deployrun

    recipe, overrides = configure.split_recipe(words or [])
    place = deployflower.place_of(os.environ, insecure)
    cli.show(deployrun.supervise(place, recipe, overrides, attempts, console), None)


@deploy.command()
def status(
    run_dir: Annotated[Path | None, typer.Argument(help="A run folder, or a folder of them: the newest.")] = None,
    insecure: Insecure = False,
    json_: Annotated[Path | None, typer.Option("--json", help="Also write the result as JSON.")] = None,
) -> None:
    """Who is connected, the round, when each client last took part, bytes."""
    from fedstrata.server import cli, deployflower, deploystatus

    flower = deployflower.Flower(deployflower.place_of(os.environ, insecure))
    if run_dir is not None and not (run_dir / "config.yaml").exists():
        run_dir = deploystatus.newest(run_dir)
    told = deploystatus.status(flower, run_dir)
    deploystatus.show(told, console)
    cli.write_json(json_, told)


@deploy.command()
def check(insecure: Insecure = False) -> None:
    """Ports, clocks, certificates, keys and data, on a client's host or the server's."""
    from fedstrata.server import deploycheck, deployflower

    found = list(deploycheck.findings(deployflower.place_of(os.environ, insecure), os.environ))
    for each in found:
        label = "[green]ok [/green]" if each.good else "[bold red]BAD[/bold red]"
        console.print(f"{label} {escape(each.what)}: {escape(each.why)}", highlight=False, soft_wrap=True)
    if bad := [each.what for each in found if not each.good]:
        raise FedstrataError(f"not ready: {', '.join(bad)}")
