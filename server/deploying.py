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
    rotate: Annotated[str, typer.Option(help="ca, server, gate or client-K: replace its key.")] = "",
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
def check(
    words: Annotated[list[str] | None, typer.Argument(help="With --round: as for `deploy run`.")] = None,
    round_: Annotated[
        Path | None, typer.Option("--round", help="Also a dry round with every client, in this new folder.")
    ] = None,
    insecure: Insecure = False,
) -> None:
    """Ports, clocks, certificates, keys and data, on a client's host or the server's; and a dry round."""
    from fedstrata.server import configure, deploycheck, deployflower

    place = deployflower.place_of(os.environ, insecure)
    found = list(deploycheck.findings(place, os.environ))
    if round_ is not None:
        recipe, overrides = configure.split_recipe(words or [])
        flower = deployflower.Flower(place)
        found += deploycheck.dry_round(flower, recipe, overrides, round_.resolve(), console)
    for each in found:
        label = "[green]ok [/green]" if each.good else "[bold red]BAD[/bold red]"
        console.print(f"{label} {escape(each.what)}: {escape(each.why)}", highlight=False, soft_wrap=True)
    if bad := [each.what for each in found if not each.good]:
        raise FedstrataError(f"not ready: {', '.join(bad)}")


@deploy.command()
def split(
    words: Annotated[list[str], typer.Argument(help="A scenario, then key=value words (seed=7).")],
    to: Annotated[Path, typer.Option(help="Gets client-0 … and server; new or empty folders.")],
    clients: Annotated[int, typer.Option(min=1, help="How many clients there are.")] = 3,
) -> None:
    """Cut a scenario's data into a folder per client, and write the server's file without data."""
    from fedstrata.server import splitting

    folders = splitting.split(splitting.resolve(words[0], words[1:], clients), to)
    console.print(f"{to}: wrote {', '.join(folder.name for folder in folders)}", highlight=False)


@deploy.command()
def node(
    data: Annotated[Path, typer.Option(envvar="FEDSTRATA_DATA", help="The client's folder.")] = Path("data"),
    home: Annotated[Path, typer.Option(envvar="FEDSTRATA_HOME", help="Its memory, sockets and logs.")] = Path("state"),
    superlink: Annotated[str, typer.Option(envvar="FEDSTRATA_SUPERLINK", help="host:port")] = "127.0.0.1:8000",
    certs: Annotated[Path, typer.Option(envvar="FEDSTRATA_CERTS", help="ca.crt and node.key.")] = Path("keys"),
    partition: Annotated[int, typer.Option(envvar="FEDSTRATA_PARTITION", help="Which client this is, from 0.")] = 0,
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS and no key; on one machine alone.")] = False,
    health: Annotated[bool, typer.Option("--health", help="Only say whether its processes run.")] = False,
) -> None:
    """Run a client: the trainer with the base model, Flower's SuperNode and its SuperExec, kept running."""
    from fedstrata.server import node as nodes

    if health:
        raise typer.Exit(0 if nodes.healthy(home) else 1)
    client = nodes.Node(data.resolve(), home.resolve(), superlink, None if insecure else certs.resolve(), partition)
    nodes.run(client, Console(stderr=True))
