"""The first half of the tiny base's pre-training: its eyes before its tongue.

A small language model cannot tell an unlearned vision tower what to look for, and both wait for each other. So the
tower and the projector first learn to make each pre-training task's answer readable by one linear map per task, far
cheaper per example than a step through the language model. The linear maps are thrown away.
"""

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedstrata.core.seeds import derive
from fedstrata.scenarios.pretraining import pretraining_examples
from fedstrata.scenarios.pretraining_pictures import COLUMNS, ROWS
from fedstrata.scenarios.stream import Example

CELLS = [f"{row} {column}" for row in ROWS for column in COLUMNS]
READABLE = (
    "inventory", "share", "texture", "backdrop", "walk", "slope", "skyline", "peak", "beads", "spelling", "signature",
)  # fmt: skip
"""The tasks whose question has no slot words: the picture alone gives the answer."""


def targets(example: Example) -> list[str]:
    """The answer's words; an inventory as size, kind and colour of all nine cells, so that words keep their places."""
    if not example.id.startswith("inventory"):
        return example.answer.split()
    board = {" ".join(thing.split()[:2]): thing.split()[2:] for thing in example.answer.split("; ")}
    return [word for cell in CELLS for word in board.get(cell, ["none"] * 3)]


class Readouts(nn.Module):
    """One linear map per task from flattened picture tokens [B, 16 * D] to word scores [B, places, words]."""

    def __init__(self, width: int, sample: Sequence[Example]) -> None:
        super().__init__()
        self.words: dict[str, dict[str, int]] = {}
        self.maps = nn.ModuleDict()
        for task in READABLE:
            answers = [targets(example) for example in sample if example.id.startswith(task + "-")]
            words = sorted({word for answer in answers for word in answer})
            self.words[task] = {word: index for index, word in enumerate(words)}
            places = max(map(len, answers))
            self.maps[task] = nn.Sequential(nn.Linear(width, places * len(words)), nn.Unflatten(1, (places, -1)))

    def loss(self, features: Tensor, examples: Sequence[Example]) -> Tensor:
        """Mean cross-entropy over tasks of the words of `examples`, whose picture tokens are `features` [B, 16, D]."""
        losses = []
        for task in READABLE:
            rows = [row for row, example in enumerate(examples) if example.id.startswith(task + "-")]
            if rows:
                scores = self.maps[task](features[rows].flatten(1))
                wanted = torch.full(scores.shape[:2], -100)
                for row, index in enumerate(rows):
                    known = [self.words[task][word] for word in targets(examples[index])]
                    wanted[row, : len(known)] = torch.tensor(known)
                losses.append(F.cross_entropy(scores.flatten(0, 1), wanted.flatten()) * len(rows))
        return torch.stack(losses).sum() / len(examples)


def pixels(processor: Any, examples: Sequence[Example]) -> Tensor:
    """What the image processor makes of 32 x 32 pictures, without its detours: [B, 3, 32, 32]."""
    pictures = np.stack([np.asarray(example.image.open()) for example in examples if example.image is not None])
    scaled = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    settings = processor.image_processor
    mean, deviation = (torch.tensor(value)[:, None, None] for value in (settings.image_mean, settings.image_std))
    return (scaled - mean) / deviation


def train_tower(model: Any, processor: Any, steps: int, seed: int, size: int = 48) -> None:
    """Trains the vision tower and the projector of a LLaVA in place."""
    sample = pretraining_examples(derive(seed, "readout words"), 6000)
    width = model.config.text_config.hidden_size * model.config.image_seq_length
    torch.manual_seed(derive(seed, "readouts"))
    readouts = Readouts(width, sample)
    tower = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    optimizer = torch.optim.AdamW([*tower, *readouts.parameters()], lr=1e-3, weight_decay=0.01, fused=True)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 100) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))
    )
    losses, started, pool, chunk = list[float](), time.perf_counter(), list[Example](), 0
    for step in range(steps):
        while len(pool) < size:
            fresh = pretraining_examples(derive(seed, "tower", chunk), 4096)
            pool += [example for example in fresh if example.id.split("-")[0] in READABLE]
            chunk += 1
        batch, pool = pool[:size], pool[size:]
        features = model.model.get_image_features(pixel_values=pixels(processor, batch)).pooler_output
        loss = readouts.loss(torch.stack(list(features)), batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(tower, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        losses.append(loss.item())
        if (step + 1) % 200 == 0:
            report("tower", step + 1, losses, started)


def report(what: str, step: int, losses: Sequence[float], started: float) -> None:
    """Prints the mean of the last 200 losses and the seconds since `started`."""
    print(f"{what} step {step}: loss {np.mean(losses[-200:]):.3f}, {time.perf_counter() - started:.0f} s", flush=True)
