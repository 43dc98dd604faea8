"""What does a method organise, training aside? Which subspace every participant of a whole run would train.

    python benchmarks/organisation.py fcit-mini-domain strategy.name=strata --seeds 100,101,102

The run's own clients send their identity tokens and its server organises them, round by round; nobody trains, and
nothing is scored. A subspace belongs to the task whose participants are in it most often. Printed for each seed: the
subspaces and the tasks, and of all visits those in another task's subspace and those that sat the round out.
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context, Message

from fedstrata.benchmarks.rounds import rounds
from fedstrata.client.app import CohortApp
from fedstrata.client.world import share_rows, world
from fedstrata.core import records
from fedstrata.core.records import TrainReply, TrainTask
from fedstrata.server.federation import Federation
from fedstrata.server.participation import visits
from fedstrata.server.runfolder import read_events


@dataclass(frozen=True)
class Organised:
    """A run's subspaces and visits; `astray`: in another task's subspace, `out`: in none."""

    subspaces: int
    tasks: int
    visits: int
    astray: int
    out: int


def organised(recipe: str, words: Sequence[str]) -> Organised:
    """One seed's. Clients with instructions of several tasks at once belong to all of them together."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with rounds(folder, ["federation.grid=inprocess", *words], recipe) as run:
            visited = _visit(run.federation)
            subspaces = len(run.federation.strategy.knowledge().adapters)
        events = [event for event in read_events(folder / "events.jsonl") if event["event"] == "round"]
    rows = [(row["subspace"], "+".join(row["tasks"])) for event in events for row in event["participants"]]
    owner = dict(pair for pair, _ in reversed(Counter(rows).most_common()))
    astray = sum(owner[subspace] != tasks for subspace, tasks in rows)
    return Organised(subspaces, len({tasks for _, tasks in rows}), visited, astray, visited - len(rows))


def _visit(federation: Federation) -> int:
    """All rounds of all stages; how many visits they had."""
    federation.grid._app = Untrained()  # type: ignore[attr-defined]
    found = 0
    for stage in range(1, len(federation.scenario.stages) + 1):
        federation.strategy.begin_stage(stage)
        federation.chronicle.stage(stage)
        for round_ in range(1, federation.rounds + 1):
            federation._round(stage, round_)
        federation.strategy.end_stage(stage)
        found += len(list(visits(federation.config, federation.scenario, stage)))
    return found


class Untrained(CohortApp):
    """The ClientApp, but that a participant sends back the adapter that came, as if it were trained."""

    def serve(self, messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
        if messages[0].metadata.message_type != records.TRAIN:
            return super().serve(messages, contexts)
        return [_echo(task, message) for task, message in zip(records.train_tasks(messages), messages, strict=True)]


def _echo(task: TrainTask, message: Message) -> Message:
    config, _, scenario = world(task.assignment)
    count = len(share_rows(scenario, config, task.assignment))
    return records.train_reply(TrainReply(task.assignment.binding, task.flat, count, 0.0, 0, 0.0), message)


def main() -> None:
    """Prints one line per seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("words", nargs="*", help="key=value")
    parser.add_argument("--seeds", default="100,101,102,103,104,105")
    given = parser.parse_args()
    for seed in given.seeds.split(","):
        found = organised(given.recipe, [*given.words, f"seed={seed}"])
        line = f"{found.subspaces} subspaces for {found.tasks} tasks; of {found.visits} visits {found.astray} astray"
        print(f"seed {seed}: {line}, {found.out} sat out", flush=True)


if __name__ == "__main__":
    main()
