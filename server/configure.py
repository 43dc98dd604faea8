"""From the words of a command line to a run's config."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedstrata import scenarios
from fedstrata.core import config as configuration
from fedstrata.core.config import RunConfig
from fedstrata.core.errors import BadInput, unknown
from fedstrata.server.results import flatten
from fedstrata.strategies import find


def resolve(recipe: str, words: Sequence[str]) -> RunConfig:
    """defaults ← the scenario's defaults, and those tuned for the strategy ← recipe ← words.

    recipe: empty, a packaged scenario's name, a scenario file or a YAML of config keys.
    """
    layers, strategy = _layers(recipe, words)
    return _absolute(configuration.build(layers, find(strategy).config_type))


def told(recipe: str, words: Sequence[str]) -> set[str]:
    """The dotted keys that `resolve` does not leave at their defaults because something names them."""
    return {key for layer in _layers(recipe, words)[0] for key in flatten(layer)}


def _layers(recipe: str, words: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    """What is laid over the defaults, later ones win, and the strategy's name."""
    layers = [_recipe(recipe), configuration.parse_words(words)]
    name = _last(layers, "scenario", "name", configuration.ScenarioSection.name)
    layers.insert(0, scenarios.defaults(name))
    strategy = _last(layers, "strategy", "name", configuration.StrategyConfig.name)
    layers.insert(1, scenarios.tuned(name, strategy))
    return layers, strategy


def split_recipe(words: Sequence[str]) -> tuple[str, list[str]]:
    """A first word without `=` is the recipe."""
    if words and "=" not in words[0]:
        return words[0], list(words[1:])
    return "", list(words)


def _absolute(config: RunConfig) -> RunConfig:
    """Paths become absolute: actors, and a later resume, may stand in another folder."""
    scenario, model, evaluate = config.scenario, config.model, config.evaluate
    scenario = replace(scenario, name=_found(scenario.name))
    evaluate = replace(evaluate, pretrained=_found(evaluate.pretrained), unseen=_found(evaluate.unseen))
    if scenario.root:
        scenario = replace(scenario, root=str(Path(scenario.root).resolve()))
    if Path(model.name).is_dir():
        model = replace(model, name=str(Path(model.name).resolve()))
    return replace(config, scenario=scenario, model=model, evaluate=evaluate)


def _found(scenario: str) -> str:
    """The absolute path of a scenario file; a packaged name as it is."""
    return str(Path(scenario).resolve()) if "/" in scenario or scenario.endswith((".yaml", ".yml")) else scenario


def _recipe(recipe: str) -> dict[str, Any]:
    if not recipe:
        return {}
    if recipe in scenarios.catalogue():
        return {"scenario": {"name": recipe}}
    path = Path(recipe)
    if not path.is_file():
        raise BadInput(f"{unknown('recipe', recipe, scenarios.catalogue())}; and there is no file of this name")
    if scenarios.is_scenario_file(path):
        return {"scenario": {"name": str(path.resolve())}}
    return configuration.read_yaml(path)


def _last(layers: Sequence[dict[str, Any]], section: str, key: str, default: str) -> str:
    found = [layer[section].get(key) for layer in layers if isinstance(layer.get(section), dict)]
    return str(next((value for value in reversed(found) if value is not None), default))
