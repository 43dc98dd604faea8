"""The two ways to train on a GPU, and what a training step keeps in memory."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fedstrata.benchmarks.gpu_parts import RANK, SCALING, Load, synchronise
from fedstrata.client.batching import collate
from fedstrata.client.lora import Cohort, adapted
from fedstrata.client.model import BaseModel
from fedstrata.client.training import Job, answer_loss, batches, train
from fedstrata.core.adapters import Flat
from fedstrata.core.config import TrainSection

ROOM = 0.7  # of the free memory that a cohort's activations may take


def activation_bytes(base: BaseModel, job: Job, settings: TrainSection) -> float:
    """Bytes per token that autograd keeps for the backward pass of one training step, weights and adapters apart."""
    cohort = Cohort.of([job.flat], base.layout, SCALING, base.device, torch.float32)
    tensors = (*base.model.parameters(), *base.model.buffers(), cohort.flat)
    known, sizes = {tensor.untyped_storage().data_ptr() for tensor in tensors}, dict[int, int]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    rows = base.tokenise(job.examples, settings.max_length)[: settings.batch_size]
    batch = collate(base, [rows])
    with adapted(base, cohort), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = answer_loss(base, batch, 1)
    assert loss.requires_grad
    return sum(sizes.values()) / batch.mask.numel()


def fitting(base: BaseModel, load: Load, per_token: float) -> int:
    """How many of the clients train in one cohort on this device."""
    if base.device.type != "cuda":
        return load.clients
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(base.device)
    return max(1, min(load.clients, int(ROOM * free / (per_token * load.batch * load.length))))


class Ours:
    """The cohort engine, as a client process runs it."""

    def __init__(self, base: BaseModel, jobs: Sequence[Job], load: Load, cohort: int) -> None:
        self.base, self.jobs, self.settings, self.cohort = base, jobs, load.settings, cohort

    def round(self) -> tuple[list[Flat], list[float]]:
        """(adapters, losses) of every client."""
        starts = range(0, len(self.jobs), self.cohort)
        cohorts = [self.jobs[start : start + self.cohort] for start in starts]
        done = [one for mine in cohorts for one in train(self.base, mine, self.settings, SCALING)]
        synchronise(self.base.device)
        return [one.flat for one in done], [one.loss for one in done]


class Sequential:
    """Clients one after another through PEFT with torch's AdamW, on a twin that shares the base's weights.

    checkpointing: as the published recipe has it on. No Trainer, no disk: less than the recipe really costs.
    """

    def __init__(self, base: BaseModel, jobs: Sequence[Job], load: Load, checkpointing: bool) -> None:
        from peft import LoraConfig, get_peft_model

        self.base, self.jobs, self.settings = base, jobs, load.settings
        tensors = (*base.model.parameters(), *base.model.buffers())
        twin = copy.deepcopy(base.model, {id(tensor): tensor for tensor in tensors})
        names = [name for name, _, _ in base.layout.modules]
        settings = LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules=names)
        self.model: Any = get_peft_model(twin, settings)
        if checkpointing:
            twin.enable_input_require_grads()
            twin.activation_checkpointing_enable({"use_reentrant": False})
            self.model.train()
        found = dict(self.model.named_parameters())
        kinds = ("lora_A", "lora_B")
        self.trained = [found[f"base_model.model.{name}.{kind}.default.weight"] for name in names for kind in kinds]
        self.steps = [self._steps(job) for job in jobs]

    def round(self) -> tuple[list[Flat], list[float]]:
        """(adapters, losses) of every client."""
        done = [self._client(job, steps) for job, steps in zip(self.jobs, self.steps, strict=True)]
        synchronise(self.base.device)
        return [flat for flat, _ in done], [loss for _, loss in done]

    def _client(self, job: Job, steps: Sequence[Mapping[str, torch.Tensor]]) -> tuple[Flat, float]:
        factors = [factor for pair in self.base.layout.split(job.flat).values() for factor in pair]
        with torch.no_grad():
            for parameter, value in zip(self.trained, factors, strict=True):
                parameter.copy_(torch.from_numpy(value))
        s, losses = self.settings, []
        optimiser = torch.optim.AdamW(self.trained, lr=s.lr, weight_decay=s.weight_decay)
        for rows in steps:
            optimiser.zero_grad()
            loss = self.model(**rows, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.trained, s.max_grad_norm)
            optimiser.step()
            losses.append(loss.detach())
        flat = np.concatenate([parameter.detach().float().cpu().numpy().ravel() for parameter in self.trained])
        return flat, float(torch.stack(losses).mean())

    def _steps(self, job: Job) -> list[dict[str, torch.Tensor]]:
        rows = self.base.tokenise(job.examples, self.settings.max_length)
        steps = [[rows[row] for row in step] for step in batches(len(rows), self.settings, job.seed)]
        return [
            {
                "input_ids": torch.tensor([row.prompt + row.answer for row in step], device=self.base.device),
                "labels": torch.tensor(
                    [(-100,) * len(row.prompt) + row.answer for row in step], device=self.base.device
                ),
            }
            for step in steps
        ]


def same(ours: tuple[list[Flat], list[float]], theirs: tuple[list[Flat], list[float]], start: Flat) -> dict[str, float]:
    """The largest relative differences of losses and updates. Raises AssertionError when losses are apart.

    In bfloat16 Adam turns rounding into steps of full size, so that updates are told and losses are held.
    """
    loss = max(abs(a - b) / abs(b) for a, b in zip(ours[1], theirs[1], strict=True))
    pairs = zip(ours[0], theirs[0], strict=True)
    update = max(float(np.linalg.norm(a - b) / np.linalg.norm(b - start)) for a, b in pairs)
    if not loss <= 0.02:
        raise AssertionError(f"the sides' losses are {loss:.1%} apart")
    return {"losses, relative difference": loss, "updates, relative difference": update}
