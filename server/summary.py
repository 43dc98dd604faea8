"""summary.json: what a run came to."""

from statistics import fmean
from typing import Any

from fedstrata.core.records import Description
from fedstrata.server import fitting, privacy
from fedstrata.server.checkpoint import state_sha256
from fedstrata.server.chronicle import between
from fedstrata.server.federation import Federation


def summarise(federation: Federation, description: Description, status: str) -> dict[str, Any]:
    """The summary of a run as it stands; undefined values are None."""
    progress, strategy, config = federation.progress, federation.strategy, federation.config
    matrix, near = progress.matrix, between(strategy.knowledge().tokens)
    rates = [rate for rate in (matrix.vocabulary[-1] if matrix.vocabulary else ()) if rate is not None]
    return {
        "version": 1,
        "status": status,
        "seed": config.seed,
        "strategy": config.strategy.name,
        "scenario": config.scenario.name,
        "scenario_hash": federation.scenario.hash,
        "uses_task_identity": strategy.uses_task_identity,
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
        "cohort_size": fitting.cohort_of(federation.grid),
        "cohort_shrunk": progress.shrunk,
        "train_seconds": progress.train_seconds,
        "wall_seconds": progress.wall_seconds,
        "final_state_sha256": state_sha256(strategy.save()),
        "subspaces": len(strategy.knowledge().adapters),
        "lora_rank": config.lora.rank,
        "adapter_rank": strategy.adapter_rank,
        "cosine_between": max(near) if near else None,
        **privacy.epsilons(config, progress),
        "too_few": sorted(progress.too_few),
        "base": description.base,
        "base_hash": description.base_hash,
        "text_encoder": description.encoder or None,
    }
