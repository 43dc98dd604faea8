"""A run's knowledge for use without fedstrata: one PEFT folder per subspace and router.json.

A projector that was trained is in every folder, whole and the same: PEFT keeps no differences of whole modules.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from fedstrata.core.adapters import Layout
from fedstrata.core.config import RunConfig, from_dict
from fedstrata.core.errors import BadInput
from fedstrata.core.peftfolder import differences, own_values, save_peft
from fedstrata.core.records import Description, Knowledge
from fedstrata.server import checkpoint, preparing
from fedstrata.server.exchange import describe
from fedstrata.server.grids import InProcessGrid
from fedstrata.server.runfolder import RunFolder
from fedstrata.strategies import find


def read_config(run_dir: Path) -> RunConfig:
    """The resolved config of a run folder."""
    tree = RunFolder(run_dir).config
    return from_dict(tree, find(str(tree["strategy"]["name"])).config_type)


def read_knowledge(run_dir: Path) -> tuple[RunConfig, Knowledge, Description]:
    """What answers at inference, from a run's newest commit, and the base it belongs to.

    Raises:
        BadInput: no run folder, no commit that verifies, or a base model with other weights than the run's.
    """
    config, commit = read_config(run_dir), checkpoint.require_newest(run_dir)
    grid = InProcessGrid(1, 1)
    text = json.dumps(preparing.on_the_wire(config))
    description = describe(grid, next(iter(grid.roster.values())), text, "")
    started = next((e for e in RunFolder(run_dir).events() if e["event"] == "run_started"), {})
    if started.get("base_hash") not in (None, description.base_hash):
        now = f"model.name {config.model.name} is now {description.base_hash}"
        raise BadInput(f"{run_dir}: was run on the base {started['base_hash']}, {now}")
    tasks = len(commit.progress["matrix"]["tasks"])
    strategy = find(config.strategy.name)(config.strategy, preparing.setup(config, description, tasks))
    strategy.load(commit.parts)
    return config, strategy.knowledge(), description


def export(run_dir: Path, to: Path) -> list[str]:
    """Writes `subspace-<i>/` folders and `router.json` into the new folder `to`; returns the subfolders' names.

    Raises:
        BadInput: `to` exists, or the run folder cannot be read.
    """
    if to.exists():
        raise BadInput(f"--to: {to} exists already; name a new folder")
    config, knowledge, description = read_knowledge(run_dir)
    layout = Layout.from_json(description.layout)
    own = own_values(config.model.name, config.model.dtype, layout) if differences(layout) else {}
    unfinished = to.with_name(f".{to.name}.{os.getpid()}.tmp")
    names = [f"subspace-{index}" for index in range(len(knowledge.adapters))]
    for name, flat in zip(names, knowledge.whole(layout.tail), strict=True):
        lora = config.lora
        save_peft(unfinished / name, layout, flat, lora.scaling, config.model.name, own, lora.kind == "rslora")
    unfinished.mkdir(parents=True, exist_ok=True)
    router = json.dumps(_router(config, knowledge, description, names), indent=1)
    (unfinished / "router.json").write_text(router, encoding="utf-8")
    unfinished.rename(to)  # whole or not at all
    return names


def _router(config: RunConfig, knowledge: Knowledge, says: Description, names: list[str]) -> dict[str, Any]:
    return {
        "version": 1,
        "strategy": config.strategy.name,
        "subspaces": names,
        "tokens": np.asarray(knowledge.tokens).tolist(),
        "options": dict(knowledge.options),
        "tau": knowledge.options.get("tau"),
        "epsilon": knowledge.options.get("epsilon"),
        "text_encoder": says.encoder or None,
        "base": says.base,
        "base_hash": says.base_hash,
        "kind": config.lora.kind,
        "scaling": config.lora.scaling,
    }
