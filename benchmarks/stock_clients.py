"""Clients as peers write them for Flower: PEFT and a loop with the model kept, and a new Trainer for every round.

Both read `rows.json` in the folder that `FEDSTRATA_BENCH` names: {"base", "rank", "scaling", "lr", "batch", "rows":
per client [[prompt and answer ids, number of answer ids], …]}.
"""

import json
import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
kept, fresh = ClientApp(), ClientApp()


@kept.train()
def train_kept(message: Message, context: Context) -> Message:
    """The model of this process is kept; its adapter is overwritten by the one that came."""
    told = facts()
    model = _model(told["base"], told["rank"], told["scaling"])
    load(model, message)
    rows = told["rows"][int(context.node_config["partition-id"])]
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=told["lr"], weight_decay=0.0)
    for start in range(0, len(rows), told["batch"]):
        model(**collate(rows[start : start + told["batch"]])).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return answer(model, message, len(rows))


@fresh.train()
def train_fresh(message: Message, context: Context) -> Message:
    """As FlowerTune's template and FCIT's code do: the model is loaded and a Trainer built for every client-round."""
    from transformers import Trainer, TrainingArguments
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    told = facts()
    model = new_model(told["base"], told["rank"], told["scaling"])
    load(model, message)
    rows = told["rows"][int(context.node_config["partition-id"])]
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=told["batch"],
            num_train_epochs=1,
            learning_rate=told["lr"],
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        Trainer(model=model, args=settings, train_dataset=rows, data_collator=collate).train()
    return answer(model, message, len(rows))


@lru_cache(maxsize=1)
def facts() -> dict[str, Any]:
    """What the benchmark wrote down for its clients."""
    torch.set_num_threads(1)
    told: dict[str, Any] = json.loads((Path(os.environ["FEDSTRATA_BENCH"]) / "rows.json").read_text(encoding="utf-8"))
    return told


def new_model(base: str, rank: int, scaling: float) -> Any:
    """The base with a fresh PEFT adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=int(scaling * rank), target_modules=TARGETS))


@lru_cache(maxsize=1)
def _model(base: str, rank: int, scaling: float) -> Any:
    return new_model(base, rank, scaling)


def load(model: Any, message: Message) -> None:
    """The adapter that came, name by name."""
    from peft import set_peft_model_state_dict

    record = message.content.array_records["arrays"]
    set_peft_model_state_dict(model, {name: torch.from_numpy(array.numpy()) for name, array in record.items()})


def answer(model: Any, message: Message, count: int) -> Message:
    """The trained adapter as a Flower reply."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model)
    record = ArrayRecord({name: Array(value.detach().numpy()) for name, value in state.items()})
    content = RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": count})})
    return Message(content, reply_to=message)


def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
    """Right-padded ids, mask and labels; only answers have labels."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [0] * (length - len(row)) for row, _ in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row, _ in rows])
    places = [(len(row) - answers, len(row)) for row, answers in rows]
    labels = torch.full_like(ids, -100)
    for index, (first, last) in enumerate(places):
        labels[index, first:last] = ids[index, first:last]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
