"""What the benchmarks on a GPU share: random models of true shapes, built on the device, and the work.

With `quick` the same code runs on the CPU at toy sizes, so that it is known to run; such a result says nothing about
speed. Image tokens are words here: the language model reads as many embeddings, and frozen image features are cached.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch

from fedstrata.benchmarks.bases import instructions, llama
from fedstrata.client.model import BaseModel
from fedstrata.client.training import Job
from fedstrata.core.adapters import fresh
from fedstrata.core.config import LoraSection, ModelSection, TrainSection
from fedstrata.core.errors import BadInput
from fedstrata.scenarios.stream import Example

SCALING, RANK = 2.0, 8
FFN = ["gate_proj", "up_proj", "down_proj"]  # what DISCO's subspaces adapt
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", *FFN]


@dataclass(frozen=True)
class Shape:
    """A Llama's."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


LLAVA_7B = Shape(4096, 11008, 32, 32, 32, 32064)  # LLaVA-1.5-7B's language model
TINYLLAMA = Shape(2048, 5632, 22, 32, 4, 32000)
SMALL = Shape(256, 512, 4, 4, 4, 4096)
TOY = Shape(32, 64, 2, 4, 4, 120)


@dataclass(frozen=True)
class Load:
    """What every client of a round trains: one epoch over rows of `length` tokens, the last `answer` supervised."""

    clients: int
    rows: int
    batch: int
    length: int
    answer: int = 16

    @property
    def tokens(self) -> int:
        """Of the whole round."""
        return self.clients * self.rows * self.length

    @property
    def steps(self) -> int:
        """Client-steps of the whole round; batches divide the rows."""
        return self.clients * self.rows // self.batch

    def words(self) -> str:
        """The work in one line."""
        return f"{self.clients} clients × {self.rows} rows × {self.length} tokens, {self.batch} in a batch"

    @property
    def settings(self) -> TrainSection:
        return TrainSection(lr=2e-4, batch_size=self.batch, local_epochs=1, warmup_steps=0, max_length=self.length + 1)


def device_of(name: str, quick: bool) -> torch.device:
    """The GPU; the CPU for a quick run. Raises `BadInput` where there is none."""
    if quick:
        torch.set_num_threads(1)
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise BadInput(f"bench {name}: no GPU found: nothing measured")
    return torch.device("cuda")


def card(device: torch.device) -> str:
    """What it ran on."""
    quick = "the CPU at toy sizes: it runs, and the figures say nothing"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else quick


def dtype_of(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float32 in a quick run."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def random_base(shape: Shape, device: torch.device, targets: Sequence[str], new: int = 16) -> BaseModel:
    """A base of this shape with random weights; nothing of it is ever on a disk."""
    import transformers

    loaders: Any = transformers
    config = loaders.LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = loaders.AutoModelForCausalLM.from_config(config, dtype=dtype_of(device), attn_implementation="sdpa")
    model.eval().requires_grad_(False)
    with TemporaryDirectory() as folder:
        llama(Path(folder), hidden=8, layers=1, vocabulary=shape.vocabulary, heads=2)  # for its tokenizer
        tokenizer = loaders.AutoTokenizer.from_pretrained(folder)
        section = ModelSection(name=folder, device=device.type, attention="sdpa", max_new_tokens=new)
        with patch("fedstrata.client.model.open_base", lambda _: (model, tokenizer)):
            return BaseModel(section, LoraSection(targets=list(targets)))


def jobs_of(base: BaseModel, load: Load, vocabulary: int) -> list[Job]:
    """Every client's rows of random words; all clients start from one adapter."""
    start, jobs = fresh(base.layout, RANK, 0), []
    for client in range(load.clients):
        rows = instructions(load.rows, load.length - load.answer, load.answer, vocabulary, client)
        examples = [Example(f"{client}-{i}", row["instruction"], row["output"]) for i, row in enumerate(rows)]
        jobs.append(Job(examples, start, client))
    return jobs


def synchronise(device: torch.device) -> None:
    """Waits for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
