"""Does every task need its image? Scores a finished run's knowledge with and without the pictures.

    fedstrata run strategy.name=joint run.dir=runs/joint
    python benchmarks/blank_image.py runs/joint --json docs/blank-image.json

A blank picture is a uniform grey of the same size. Claim: each of fcit-mini's tasks loses at least 15 points.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedstrata import scenarios
from fedstrata.client.evaluation import Answerer, score
from fedstrata.client.world import base_of
from fedstrata.core.scoring import percentages
from fedstrata.scenarios.stream import Example, Pixels
from fedstrata.server.export import read_knowledge
from fedstrata.strategies import find


def blank(example: Example) -> Example:
    """The example with a grey picture."""
    if example.image is None:
        return example
    width, height = example.image.open().size
    return replace(example, image=Pixels(np.full((height, width, 3), 128, dtype=np.uint8)))


def main() -> None:
    """Prints one line per task: with, without, difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    config, knowledge, says = read_knowledge(given.run)
    scenario = scenarios.of(config)
    router = find(config.strategy.name).router(knowledge)
    answerer = Answerer(base_of(config), knowledge, router, config.lora.scaling)
    rows = {}
    for index, task in enumerate(scenario.tasks):
        points = []
        for examples in (list(task.test), [blank(example) for example in task.test]):
            answers = answerer.answer(examples, index, config.evaluate.batch_size, config.train.max_length)
            reply = score(task, examples, answers, scenario.vocabulary(index))
            points.append(percentages(reply.stats, reply.count)[task.metric])
        rows[task.name] = {"with": points[0], "blank": points[1], "difference": points[0] - points[1]}
        print(
            f"{task.name:12} with {points[0]:5.1f}   blank {points[1]:5.1f}   difference {points[0] - points[1]:5.1f}"
        )
    if given.json:
        tree = {"strategy": config.strategy.name, "seed": config.seed, "base_hash": says.base_hash, "tasks": rows}
        given.json.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
