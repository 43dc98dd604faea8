"""Greedy answers: which questions make a batch, what the base is given, and the texts that come out."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from fedstrata.client.features import features_of
from fedstrata.client.model import BaseModel
from fedstrata.client.prompts import Prepared
from fedstrata.scenarios.stream import Example


def grouped(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Places in batches of `size`, short ones first where there are several: a batch is padded to its longest."""
    order = (
        sorted(range(len(lengths)), key=lambda place: lengths[place]) if len(lengths) > size else range(len(lengths))
    )
    return [list(order[start : start + size]) for start in range(0, len(lengths), size)]


def generate(base: BaseModel, examples: Sequence[Example], max_length: int, overlong: str = "refuse") -> list[str]:
    """One batch of greedy answers to the first questions."""
    return decode(base, greedy(base, questions(base, examples, max_length, overlong)))


def questions(
    base: BaseModel, examples: Sequence[Example], max_length: int, overlong: str = "refuse"
) -> list[Prepared]:
    """The examples' first questions as tokens.

    overlong: cut: a question is cut as if its answer were empty, so that what is asked does not depend on it.
    """
    asked = [replace(example, more=(), answer="" if overlong == "cut" else example.answer) for example in examples]
    return base.tokenise(asked, max_length, overlong)


@torch.no_grad()
def greedy(base: BaseModel, rows: Sequence[Prepared]) -> torch.Tensor:
    """Greedy answers as tokens [B, at most model.max_new_tokens]; prompts are padded on the left."""
    batch = base.embed([row.prompt for row in rows], features_of(base.pictures, rows), left=True)
    pad = base.tokenizer.pad_token_id
    tokens: torch.Tensor = base.model.generate(
        inputs_embeds=batch.embeds,
        attention_mask=batch.mask,
        max_new_tokens=base.max_new_tokens,
        do_sample=False,
        pad_token_id=pad if pad is not None else 0,
        eos_token_id=base.tokenizer.eos_token_id,
    )
    return tokens


def decode(base: BaseModel, tokens: torch.Tensor) -> list[str]:
    """The texts of generated tokens."""
    return [str(text).strip() for text in base.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def passing(base: BaseModel, rows: Sequence[Prepared]) -> int:
    """How many tokens pass through the model when these are answered."""
    return sum(len(row.prompt) + base.max_new_tokens for row in rows)
