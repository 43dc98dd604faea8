"""A whole round of 32 clients: our server, gate, commit and Ray grid, against stock Flower simulation."""

import json
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml

from fedstrata.benchmarks.bases import instructions, llama, write_rows
from fedstrata.benchmarks.measure import Result, paired, ratios, raw
from fedstrata.benchmarks.rounds import Rounds, rounds
from fedstrata.benchmarks.stock import Named, Stock, stock
from fedstrata.client import world
from fedstrata.client.batching import batches
from fedstrata.client.prompts import Prepared
from fedstrata.core.adapters import Flat
from fedstrata.core.records import Assignment, Binding
from fedstrata.core.seeds import derive

VOCABULARY, ROWS, LR = 512, 8, 1e-3
KEPT, FRESH = "stock Flower + PEFT, model kept", "stock Flower + Trainer and model per client-round"
APPS = {KEPT: "fedstrata.benchmarks.stock_clients:kept", FRESH: "fedstrata.benchmarks.stock_clients:fresh"}


def bench(quick: bool = False) -> Result:
    """Wall seconds of a round; both sides with two actors; the aggregates of the first round must be equal."""
    clients, repeats = (4, 1) if quick else (32, 5)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        run = stack.enter_context(rounds(folder / "run", words(folder, clients), str(scenario(folder, clients))))
        start = run.federation.strategy.knowledge().adapters[0]
        layout = run.federation.strategy.setup.layout
        tell(folder, run, clients)
        os.environ["FEDSTRATA_BENCH"] = str(folder)
        peers: dict[str, Stock] = {}
        for number, (label, client) in enumerate(APPS.items()):
            side = stock(client, clients, 2, named(layout.split(start)), folder / f"peer-{number}")
            peers[label] = stack.enter_context(side)
        run.next()
        peers[KEPT].next()
        far = distance(run.federation.strategy.knowledge().adapters[0], start, peers[KEPT].arrays(), run)
        if far > 1e-3:
            raise AssertionError(f"the aggregates of the first round differ by {far:.1e} of the update")
        sides = {"ours": run.next, **{label: peer.next for label, peer in peers.items()}}
        trained = run.federation.progress.train_seconds
        found = paired(sides, repeats)
        trained = (run.federation.progress.train_seconds - trained) / (repeats + 1) / 2
    serving = 1000 * median(costs["ours"].cpu for costs in found)
    return Result(
        name="e2e",
        what=f"a round of {clients} clients (hidden 64, {ROWS} rows of 32 tokens, batch 2), two actors",
        clock="wall",
        ratios=ratios(found, "ours", "wall"),
        targets={KEPT: 8, FRESH: 30},
        pairs=raw(found),
        equal={"first round, ‖difference‖ / ‖update‖": far},
        notes=(
            "Ours includes the gate, the kept replies and the commit with its fsync; the peers' servers store none.",
            f"Of ours: {1000 * trained:.0f} ms of training in each actor, {serving:.0f} ms of the server's CPU.",
        ),
    )


def scenario(folder: Path, clients: int) -> Path:
    """A scenario file of one text task that deals every client `ROWS` rows."""
    write_rows(folder / "train.json", instructions(ROWS * clients, 16, 16, VOCABULARY, 0))
    write_rows(folder / "test.json", instructions(2, 16, 16, VOCABULARY, 1))
    tree = {
        "tasks": {"words": {"train": "train.json", "test": "test.json", "format": "alpaca"}},
        "stages": [["words"]],
        "partition": {"kind": "iid"},
    }
    path = folder / "words.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return path


def words(folder: Path, clients: int) -> list[str]:
    """The config of our side."""
    base = llama(folder / "base", 64, 2, VOCABULARY)
    return [
        f"model.name={base}",
        "strategy.name=finetune",
        "strategy.subspaces=1",
        f"federation.clients={clients}",
        f"federation.clients_per_round={clients}",
        "federation.rounds_per_stage=99",
        "federation.actors=2",
        "federation.cohort_size=16",
        f"train.lr={LR}",
        "train.batch_size=2",
        "train.local_epochs=1",
        "train.warmup_steps=0",
        "train.max_grad_norm=0",
    ]


def tell(folder: Path, run: Rounds, clients: int) -> None:
    """rows.json for the peers: the same base, and every client's rows as tokens in the order of round 1."""
    federation = run.federation
    config = federation.config
    base = world.base_of(config)
    rows = []
    for client in range(clients):
        at = Assignment(Binding(federation.run_id, 1, 1, client), (0,), config=federation.config_json)
        mine = base.tokenise(world.share(federation.scenario, config, at), config.train.max_length)
        seed = derive(config.seed, "batches", 1, 1, client)
        order = [row for batch in batches(len(mine), config.train, seed) for row in batch]
        rows.append([tokens(mine[row]) for row in order])
    told: dict[str, Any] = {"base": config.model.name, "rank": config.lora.rank, "rows": rows}
    told |= {"scaling": config.lora.scaling, "lr": LR, "batch": config.train.batch_size}
    (folder / "rows.json").write_text(json.dumps(told), encoding="utf-8")


def tokens(row: Prepared) -> tuple[list[int], int]:
    """Prompt and answer in one, and how many belong to the answer."""
    return [*row.prompt, *row.answer], len(row.answer)


def named(factors: dict[str, tuple[Flat, Flat]]) -> Named:
    """An adapter under PEFT's names."""
    pairs = [(f"base_model.model.{name}.lora_{kind}.weight", f) for name, ab in factors.items() for kind, f in
             zip("AB", ab, strict=True)]  # fmt: skip
    return dict(pairs)


def distance(ours: Flat, start: Flat, theirs: Named, run: Rounds) -> float:
    """‖ours − theirs‖ / ‖ours − start‖."""
    layout = run.federation.strategy.setup.layout
    wanted = named(layout.split(ours))
    off = np.concatenate([(wanted[name] - theirs[name]).ravel() for name in wanted])
    return float(np.linalg.norm(off) / np.linalg.norm(ours - start))
