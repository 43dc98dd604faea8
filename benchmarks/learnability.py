"""How well the tiny base learns each of fcit-mini's tasks by LoRA on the language model alone.

    python benchmarks/learnability.py [--base client/tiny] [--tasks names charts] [--steps 375]

For each task a fresh rank-8 LoRA is trained on 1200 samples; the vision tower, projector and embeddings stay frozen, so
picture features are computed once. Printed, in points: chance, zero-shot, after 75 steps (the serial steps of a
federated stage), after all steps, and with every picture replaced by a blank one. Exact match is judged with the answer
as input: greedy decoding gives the answer exactly when every token of it, and the end token, is the most likely one.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from fedstrata.client.architecture import IMAGE
from fedstrata.client.pretrain import collate
from fedstrata.core.seeds import generator
from fedstrata.scenarios.mini import CHANCE, MINI_TASKS, mini_task
from fedstrata.scenarios.stream import Example, Pixels

TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
Data = dict[str, Tensor]


def prepare(model: Any, processor: LlavaProcessor, examples: Sequence[Example]) -> Data:
    """Ids, labels and mask [N, T], and the frozen picture features [N, 16, hidden]."""
    data = collate(processor.tokenizer, processor, examples)
    with torch.no_grad():
        features = model.model.get_image_features(pixel_values=data.pop("pixel_values")).pooler_output
    data["features"] = torch.stack(list(features))
    return data


def blank(examples: Sequence[Example]) -> list[Example]:
    """The same questions over a uniform grey picture."""
    picture = Pixels(np.full((32, 32, 3), 200, dtype=np.uint8))
    return [Example(e.id, e.question, e.answer, picture) for e in examples]


def logits_and_labels(model: Any, data: Data, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [A, V], labels [A] and row numbers [A] of the answer tokens of some rows."""
    length = int(data["attention_mask"][rows].sum(1).max())
    ids, labels = data["input_ids"][rows, :length], data["labels"][rows, 1:length]
    embedded = model.get_input_embeddings()(ids)
    embedded = embedded.masked_scatter((ids == IMAGE)[..., None], data["features"][rows])
    hidden = model.base_model.language_model if hasattr(model.base_model, "language_model") else None
    hidden = hidden or model.base_model.model.model.language_model
    states = hidden(inputs_embeds=embedded, attention_mask=data["attention_mask"][rows, :length]).last_hidden_state
    wanted = labels >= 0
    return model.lm_head(states[:, :-1][wanted]), labels[wanted], torch.nonzero(wanted)[:, 0]


@torch.no_grad()
def accuracy(model: Any, data: Data) -> float:
    """Exact match in points."""
    right = 0
    for rows in torch.arange(len(data["input_ids"])).split(100):  # type: ignore[no-untyped-call]
        logits, labels, where = logits_and_labels(model, data, rows)
        wrong = torch.zeros(len(rows)).index_add_(0, where, (logits.argmax(-1) != labels).float())
        right += int((wrong == 0).sum())
    return 100 * right / len(data["input_ids"])


def learn(model: Any, data: Data, check: Data, steps: int) -> tuple[float, float]:
    """Trains the adapter; (accuracy after 75 steps, milliseconds per step)."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0)
    rng, spent, early = generator(0, "learnability"), 0.0, 0.0
    for step in range(steps):
        started = time.perf_counter()
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 3)
        rows = torch.from_numpy(rng.choice(len(data["input_ids"]), 16, replace=False))
        logits, labels, _ = logits_and_labels(model, data, rows)
        F.cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        spent += time.perf_counter() - started
        if step + 1 == 75:
            early = accuracy(model, check)
    return early, 1000 * spent / steps


def measure(base: Path, name: str, steps: int) -> None:
    """Prints one row of the table."""
    model = LlavaForConditionalGeneration.from_pretrained(base, attn_implementation="eager").eval()  # type: ignore[no-untyped-call]
    processor = LlavaProcessor.from_pretrained(base)
    task = mini_task(name, 0, 1200, 300, 0)
    train, val, dull = (prepare(model, processor, part) for part in (task.train, task.val, blank(task.val)))
    start = accuracy(model, val)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS))
    early, pace = learn(adapted, train, val, steps)
    row = (100 * CHANCE[name], start, early, accuracy(adapted, val), accuracy(adapted, dull), pace)
    print(f"{name:<12}" + "".join(f"{value:>10.1f}" for value in row), flush=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Learn each fcit-mini task with a fresh adapter.")
    parser.add_argument("--base", type=Path, default=Path(__file__).parent.parent / "client" / "tiny")
    parser.add_argument("--tasks", nargs="+", choices=MINI_TASKS, default=MINI_TASKS)
    parser.add_argument("--steps", type=int, default=375)
    options = parser.parse_args()
    torch.set_num_threads(1)
    heads = ("chance", "zero", "at 75", "learnt", "blank", "ms/step")
    print(f"{'task':<12}" + "".join(f"{head:>10}" for head in heads))
    for name in options.tasks:
        measure(options.base, name, options.steps)


if __name__ == "__main__":
    main()
