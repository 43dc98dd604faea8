"""What `fedstrata resume` checks and puts in order before a run goes on."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedstrata.core import config as configuration
from fedstrata.core import durable
from fedstrata.core.config import RunConfig
from fedstrata.core.errors import BadInput
from fedstrata.server import checkpoint
from fedstrata.server.checkpoint import Commit, Found
from fedstrata.server.results import HOW_FAST, flatten
from fedstrata.server.runfolder import CHECKPOINTS, REPORT, SUMMARY, RunFolder
from fedstrata.strategies import find


def read_config(run: RunFolder, words: Sequence[str] = ()) -> RunConfig:
    """The run's config with `words` over it, which may change how fast it runs and nothing else.

    Raises:
        BadInput: names the keys that would change the result.
    """
    kind = find(str(run.config["strategy"]["name"])).config_type
    before = configuration.from_dict(run.config, kind)
    after = configuration.build([run.config, configuration.parse_words(words)], kind)
    differ = differing(flatten(configuration.to_dict(before)), flatten(configuration.to_dict(after)))
    wrong = [key for key in differ if key not in HOW_FAST]
    if wrong:
        raise BadInput(f"{', '.join(wrong)}: a resumed run may change only {', '.join(HOW_FAST)}")
    return after


def differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The keys of `before` that `after` lacks or gives another value."""
    return sorted(key for key, value in before.items() if key not in after or after[key] != value)


def starting_point(run: RunFolder, from_stage: int | None) -> Found:
    """The commit to go on from; what killed writers left unfinished is removed.

    Raises:
        BadInput: the run is completed, its newest commits are damaged, or `from_stage` has not begun.
    """
    if from_stage is not None:
        return Found(_go_back(run, from_stage))
    if run.has(SUMMARY) and run.summary.get("status") == "completed":
        raise BadInput(f"{run.path}: is completed, there is nothing to resume")
    for folder in (run.path, run.path / CHECKPOINTS, run.path / "predictions"):
        durable.sweep(folder)
    found = checkpoint.find(run.path / CHECKPOINTS)
    if len(found.damaged) > 1 or (found.damaged and found.commit is None):
        hint = f"to go on from an earlier stage: fedstrata resume {run.path} --from-stage K"
        raise BadInput(f"{run.path}: more than the newest commit is damaged ({'; '.join(found.damaged)}); {hint}")
    return found


def _go_back(run: RunFolder, stage: int) -> Commit:
    """Removes what came after the stage before `stage`; first of all the word that the run is completed."""
    folder = run.path / CHECKPOINTS
    commit = checkpoint.stage_start(folder, stage)
    if commit is None:
        raise BadInput(f"--from-stage {stage}: {folder} holds no whole commit from which stage {stage} begins")
    for name in (SUMMARY, REPORT):
        durable.remove(run.path / name)
    durable.sync_folder(run.path)
    checkpoint.drop_after(folder, commit.number)
    for path in folder.glob("round-*"):
        shutil.rmtree(path)
    for path in (run.path / "predictions").glob("stage-*.jsonl"):
        if int(path.stem.removeprefix("stage-")) >= stage:
            durable.remove(path)
    return commit


def other_versions(commit: Commit, now: Mapping[str, Any]) -> list[str]:
    """What was installed when the commit was made and is another version now; bits may differ from here on."""
    then, ours = commit.bound.get("versions", {}), now["versions"]
    return [f"{name} {then[name]} then, {ours.get(name)} now" for name in differing(then, ours)]


def check_bound(path: Path, commit: Commit, now: Mapping[str, Any]) -> None:
    """A commit is gone on from by the run that made it. Raises `BadInput` naming what differs."""
    then = commit.bound
    keys = differing(then.get("settings", {}), now["settings"])
    if keys:
        raise BadInput(f"{path}: config.yaml was changed since the run began: {', '.join(keys)}")
    for name in ("base", "scenario"):
        if name in then and then[name] != now[name]:
            raise BadInput(f"{path}: the {name} is another than at the last commit: {then[name]} then, {now[name]} now")
