"""Random language models of a given shape, and instructions made of their words, for measurements."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"  # the question alone, so that lengths are exact


def llama(
    folder: Path,
    hidden: int,
    layers: int,
    vocabulary: int,
    heads: int = 4,
    intermediate: int | None = None,
    spread: float = 0.1,
) -> Path:
    """A Llama with random weights (seed 0) and a tokenizer of `vocabulary` words w4, w5, … as a transformers folder.

    spread: the weights' standard deviation; transformers' own is 0.02.
    """
    torch.manual_seed(0)
    words = {**{name: i for i, name in enumerate(SPECIAL)}, **{f"w{i}": i for i in range(len(SPECIAL), vocabulary)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate or 2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=512,
        initializer_range=spread,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    disable_progress_bar()  # type: ignore[no-untyped-call]
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def instructions(count: int, question: int, answer: int, vocabulary: int, seed: int) -> list[dict[str, str]]:
    """`count` Alpaca rows of random words: `question` tokens, then `answer` tokens with the end of the sequence."""
    draw = np.random.default_rng(seed)
    rows = draw.integers(len(SPECIAL), vocabulary, size=(count, question + answer - 1))
    texts = [[f"w{token}" for token in row] for row in rows.tolist()]
    return [{"instruction": " ".join(t[:question]), "output": " ".join(t[question:])} for t in texts]


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Rows as a JSON file."""
    path.write_text(json.dumps(list(rows)), encoding="utf-8")
