"""`fedstrata deploy …`: the commands of a deployment; what they do is in `server/deploy*.py` and `client/`."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

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
