"""The cells of a sweep: every combination of the values that its words or its file give, each one plain run.

`strategy.name=finetune,disco,disco+activation=argmax seed=0,1,2 train.lr=1e-3,2e-3`: values of a key are separated by
commas (not those within brackets); a strategy may bring options of its own, `name+option=value`. A sweep file is a YAML
of config keys, which every cell has, `sweep: {key: [values]}`, and `tuned: {strategy: {section: {key: value}}}` for the
cells of one strategy, as in a scenario file; words win over the file.
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from fedstrata.core.config import RunConfig, from_dict, read_yaml, to_dict
from fedstrata.core.errors import BadInput
from fedstrata.server import configure
from fedstrata.server.results import flatten, settings
from fedstrata.strategies import find

Axes = Mapping[str, Sequence[str]]  # config key → its values, as words
STRATEGY, SCENARIO, SEED = "strategy.name", "scenario.name", "seed"
Tuned = Mapping[str, Mapping[str, str]]  # strategy → config key → its value, as a word
OUTER = (SEED, SCENARIO)  # a table of one seed is whole before the next one begins
MACHINES = "model.matmul"  # auto is resolved by each machine


@dataclass(frozen=True)
class Cell:
    """One run of a sweep. `name` is that of its run folder and its result file; `words` give it on a command line."""

    name: str
    words: tuple[str, ...]
    config: RunConfig

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Dotted key → value of what decides the result."""
        return settings(to_dict(self.config))

    def matches(self, now: Mapping[str, Any]) -> bool:
        """Whether settings (`present`) are this cell's; each machine resolves `model.matmul=auto`: any matches."""
        free = self.config.model.matmul == "auto"
        return all(now.get(k) == v for k, v in self.settings.items() if not (free and k == MACHINES))


def present(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run's config, as its folder or result file has it, in the words of today.

    A key that it lacks came later than the run and counts as at its default. Empty for a version whose keys are gone.
    """
    try:
        return settings(to_dict(from_dict(config, find(str(config["strategy"]["name"])).config_type)))
    except (BadInput, KeyError, TypeError):
        return {}


def cells(recipe: str, words: Sequence[str]) -> list[Cell]:
    """Every combination, seeds outermost. recipe: what `fedstrata run` takes, or a sweep file.

    Raises:
        BadInput: a mistake in one of the cells, two cells with one name, or a key that the sweep sets itself.
    """
    recipe, axes, tuned = _axes(recipe, words)
    if "run.dir" in axes:
        raise BadInput("run.dir: a sweep gives every cell a folder of its own; name theirs with --dir")
    varied = [key for key, values in axes.items() if len(values) > 1]
    order = sorted(axes, key=lambda key: OUTER.index(key) if key in OUTER else len(OUTER))
    found = [
        _cell(recipe, dict(zip(order, values, strict=True)), varied, tuned)
        for values in itertools.product(*(axes[key] for key in order))
    ]
    names = [cell.name for cell in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BadInput(f"sweep: cells must differ, got two of {', '.join(twice)}")
    return found


def _axes(recipe: str, words: Sequence[str]) -> tuple[str, dict[str, Sequence[str]], Tuned]:
    """The recipe that is left for the cells, all keys with their values, and what single strategies have."""
    axes: dict[str, Sequence[str]] = {}
    tuned: Tuned = {}
    path = Path(recipe)
    if recipe and path.is_file() and "sweep" in (tree := read_yaml(path)):
        recipe, tuned = "", _tuned(path, tree.pop("tuned", {}))
        axes = _of_file(path, tree)
    for word in words:
        key, separator, text = word.partition("=")
        if not separator or not key:
            raise BadInput(f"{word!r}: expected key=value or key=value,value, for example seed=0,1,2")
        axes[key] = split(text)
    return recipe, axes, tuned


def _tuned(path: Path, tree: Any) -> Tuned:
    if not isinstance(tree, dict) or not all(isinstance(keys, dict) for keys in tree.values()):
        raise BadInput(f"{path}: tuned: must map strategies to config keys, got {tree!r}")
    return {str(name): {key: _word(value) for key, value in flatten(keys).items()} for name, keys in tree.items()}


def _of_file(path: Path, tree: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    swept = tree["sweep"]
    if not isinstance(swept, dict) or not all(isinstance(values, list) and values for values in swept.values()):
        raise BadInput(f"{path}: sweep: must map config keys to lists of values, got {swept!r}")
    fixed = flatten({key: value for key, value in tree.items() if key != "sweep"})
    lists = {key: [value] for key, value in fixed.items()} | swept
    return {str(key): [_word(value) for value in values] for key, values in lists.items()}


def _word(value: Any) -> str:
    """A value as it is written on a command line."""
    return value if isinstance(value, str) and yaml.safe_load(value) == value else json.dumps(value)


def split(text: str) -> list[str]:
    """At the commas outside brackets.

    >>> split("[a,b],c")
    ['[a,b]', 'c']
    """
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "[{(") - (sign in "]})")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def _cell(recipe: str, chosen: Mapping[str, str], varied: Sequence[str], tuned: Tuned) -> Cell:
    words, label = [], ""
    for key, value in chosen.items():
        name, *options = value.split("+") if key == STRATEGY else [value]
        words += [f"{key}={name}", *(f"strategy.{option}" for option in options)]
        if key == STRATEGY:
            label = "+".join([name.rpartition(":")[2], *options])
            words = [f"{key}={text}" for key, text in tuned.get(name, {}).items() if key not in chosen] + words
    config = configure.resolve(recipe, words)
    more = [f"+{key}={chosen[key]}" for key in varied if key not in (STRATEGY, *OUTER)]
    stem = f"{Path(config.scenario.name).stem}-{label or config.strategy.name}{''.join(more)}-seed{config.seed}"
    return Cell(re.sub(r"[^\w.+=,-]", "_", stem), ((recipe,) if recipe else ()) + tuple(words), config)
