"""summary.json: what a run came to."""

from statistics import fmean
from typing import Any

from fedstrata.core.config import RunConfig
from fedstrata.core.records import Description
from fedstrata.server import fitting, privacy
from fedstrata.server.checkpoint import Commit, state_sha256
from fedstrata.server.chronicle import between
from fedstrata.server.federation import Federation
from fedstrata.server.progress import Progress
from fedstrata.strategies import find


def summarise(federation: Federation, description: Description, status: str) -> dict[str, Any]:
    """The summary of a run as it stands; undefined values are None."""
    strategy, config = federation.strategy, federation.config
    near = between(strategy.knowledge().tokens)
    return {
        **so_far(config, federation.progress, status),
        "scenario_hash": federation.scenario.hash,
        "cohort_size": fitting.cohort_of(federation.grid),
        "final_state_sha256": state_sha256(strategy.save()),
        "subspaces": len(strategy.knowledge().adapters),
        "adapter_rank": strategy.adapter_rank,
        "cosine_between": max(near) if near else None,
        "base": description.base,
        "base_hash": description.base_hash,
        "text_encoder": description.encoder or None,
    }


def of_commit(config: RunConfig, progress: Progress, commit: Commit | None) -> dict[str, Any]:
    """The summary of an interrupted run by its last commit alone; what only the run could tell is None."""
    bound = commit.bound if commit else {}
    return {
        **so_far(config, progress, "interrupted"),
        "scenario_hash": bound.get("scenario"),
        "cohort_size": None,
        "final_state_sha256": state_sha256(commit.parts) if commit else None,
        "subspaces": None,
        "adapter_rank": None,
        "cosine_between": None,
        "base": None,
        "base_hash": bound.get("base"),
        "text_encoder": None,
    }


def so_far(config: RunConfig, progress: Progress, status: str) -> dict[str, Any]:
    """What config and progress tell."""
    matrix = progress.matrix
    rates = [rate for rate in (matrix.vocabulary[-1] if matrix.vocabulary else ()) if rate is not None]
    return {
        "version": 1,
        "status": status,
        "seed": config.seed,
        "strategy": config.strategy.name,
        "scenario": config.scenario.name,
        "uses_task_identity": find(config.strategy.name).uses_task_identity,
        "last": matrix.last,
        "avg": matrix.avg,
        "forgetting": matrix.forgetting,
        "bwt": matrix.bwt,
        "fwt": matrix.fwt,
        "routing_accuracy": fmean(progress.routing.values()) if progress.routing else None,
        "vocabulary_rate": fmean(rates) if rates else None,
        "bytes_up": progress.bytes_up,
        "bytes_down": progress.bytes_down,
        "bytes_eval": progress.bytes_eval,
        "skipped_rounds": progress.skipped_rounds,
        "cohort_shrunk": progress.shrunk,
        "train_seconds": progress.train_seconds,
        "wall_seconds": progress.wall_seconds,
        "lora_rank": config.lora.rank,
        **privacy.epsilons(config, progress),
        "too_few": sorted(progress.too_few),
    }
