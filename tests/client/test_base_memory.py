"""One base per machine: workers read the weights from the same pages of the same file, and never write them."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fedstrata.client.evaluation import generate
from fedstrata.client.model import TINY, BaseModel
from fedstrata.client.training import Job, train
from fedstrata.core.adapters import fresh
from fedstrata.core.config import LoraSection, ModelSection, TrainSection
from fedstrata.scenarios.stream import Example

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mappings are read from /proc")


def mappings() -> list[tuple[int, int, str, int]]:
    """(first address, last, file, private kB that differ from the file) of this process."""
    found = []
    for block in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ *(.*)", block):
            changed = re.search(r"^Anonymous: +(\d+) kB", block, re.MULTILINE)
            found.append((int(head[1], 16), int(head[2], 16), head[3], int(changed[1]) if changed else 0))
    return found


def homes(base: BaseModel) -> set[tuple[str, int]]:
    """(file, changed kB) of the mappings in which the base's parameters lie."""
    known = mappings()
    places = [p.data_ptr() for p in base.model.parameters()]
    return {(path, changed) for place in places for start, end, path, changed in known if start <= place < end}


def write_llama(folder: Path, dtype: torch.dtype) -> Path:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    ids: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(vocab_size=2000, num_attention_heads=4, tie_word_embeddings=True, **sizes, **ids)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["llava", "float32", "bfloat16"])
def test_the_weights_stay_in_the_file_whatever_is_done_with_them(kind: str, llava: Path, tmp_path: Path) -> None:
    folder = llava if kind == "llava" else write_llama(tmp_path / "base", getattr(torch, kind))
    dtype = "bfloat16" if kind == "bfloat16" else "float32"
    base = BaseModel(ModelSection(name=str(folder), dtype=dtype, max_new_tokens=2), LoraSection(rank=2))
    expected = {(str(folder / "model.safetensors"), 0)}
    assert homes(base) == expected
    rows = [Example("one", "what colour?", "red")]
    generate(base, rows, 64)
    train(base, [Job(rows, fresh(base.layout, 2, 0), 0)], TrainSection(local_epochs=1), 2.0)
    assert len(base.hash) == 16
    assert homes(base) == expected


def test_the_text_encoder_reads_the_bases_own_embedding() -> None:
    base = BaseModel(ModelSection(), LoraSection())
    held = vars(base.encoder)["_embedding"]
    assert held.data_ptr() == base.model.get_input_embeddings().weight.data_ptr()
