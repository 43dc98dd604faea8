"""How many bytes training needs: pure functions of a model's shape and the run's config, calibrated by measurement.

What a client adds to an actor is what autograd keeps of one forward pass, and its adapter with gradient and two
moments. The terms are the tensors that eager transformers code keeps; a test compares their sum with the most bytes of
tensors that a real step has.
"""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from fedstrata.core.adapters import Layout
from fedstrata.core.config import RunConfig

STATE = 16  # bytes per trained parameter: value, gradient and two moments, float32
SIZES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Shape:
    """What a model's config says of its size; `head`: features of an attention head; `picture`: tokens of a picture."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    head: int
    vocabulary: int
    picture: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Shape":
        """Raises ValueError or TypeError for anything but the words of `to_json`."""
        shape = Shape(**json.loads(text))
        least = {name: 0 if name == "picture" else 1 for name in asdict(shape)}
        if not all(isinstance(value, int) and value >= least[name] for name, value in asdict(shape).items()):
            raise ValueError(f"shape: must be whole numbers of at least 1, got {text}")
        return shape


@dataclass(frozen=True)
class Work:
    """One client's part of one forward pass: rows of `length` tokens, `answer` of them supervised."""

    rows: int
    length: int
    answer: int
    dtype: str = "float32"
    attention: str = "eager"
    checkpointing: bool = False
    dropout: bool = False


def shape_of(settings: Any) -> Shape:
    """The shape in a transformers config, of its language model where it has several parts."""
    text = settings.get_text_config()
    hidden, heads = int(text.hidden_size), int(text.num_attention_heads)
    return Shape(
        hidden=hidden,
        intermediate=int(getattr(text, "intermediate_size", None) or 4 * hidden),
        layers=int(text.num_hidden_layers),
        heads=heads,
        head=int(getattr(text, "head_dim", None) or hidden // heads),
        vocabulary=int(text.vocab_size),
        picture=int(getattr(settings, "image_seq_length", 0)),
    )


def work_of(config: RunConfig) -> Work:
    """The largest forward pass that a config allows a client; answers as long as those that it generates."""
    train, model = config.train, config.model
    rows = min(train.micro_batch or train.batch_size, train.batch_size)
    answer, dropout = min(model.max_new_tokens, train.max_length), config.lora.dropout > 0
    return Work(rows, train.max_length, answer, model.dtype, model.attention, train.checkpointing, dropout)


def client_bytes(shape: Shape, layout: Layout, rank: int, work: Work) -> int:
    """What one more client in a cohort costs an actor."""
    return activations(shape, layout, work) + STATE * layout.size(rank)


def activations(shape: Shape, layout: Layout, work: Work) -> int:
    """Bytes that autograd keeps of one client's forward pass, and what the backward pass makes of one layer.

    With checkpointing only the layers' inputs are kept, and one layer at a time is computed again.
    """
    size, tokens = SIZES[work.dtype], work.rows * work.length
    layer = _layer(shape, layout, work)
    head = work.rows * work.answer * (shape.vocabulary * (4 + _wide(work)) + shape.hidden * size)
    inputs = shape.layers * tokens * shape.hidden * size
    kept = inputs + layer if work.checkpointing else shape.layers * layer
    return kept + _layer(shape, layout, replace(work, dtype="float32")) + head  # gradients are float32 in parts


def _layer(shape: Shape, layout: Layout, work: Work) -> int:
    """Bytes of what one decoder layer keeps."""
    size, tokens = SIZES[work.dtype], work.rows * work.length
    inputs = _inputs(shape, layout, work) // shape.layers
    norms = 2 * 4 * shape.hidden  # their inputs, float32
    attention = 3 * shape.heads * shape.head * size  # query, key and value, repeated for every head
    mlp = 3 * shape.intermediate * size  # gate, its activation, up
    scores = work.rows * shape.heads * work.length**2 * _wide(work) if work.attention == "eager" else 0
    return tokens * (norms + attention + mlp + inputs) + scores


def _wide(work: Work) -> int:
    """Bytes of an element that is kept as float32, and as the base's type where that is another one."""
    return 4 + (SIZES[work.dtype] if work.dtype != "float32" else 0)


def _inputs(shape: Shape, layout: Layout, work: Work) -> int:
    """Bytes per token that adapters keep of their inputs.

    Adapters on one input share it; with a dropout each keeps its own and the mask.
    """
    each = sum(inner for _, _, inner in layout.modules)
    shared = shape.layers * (2 * shape.hidden + shape.heads * shape.head + shape.intermediate)
    return SIZES[work.dtype] * (2 * each if work.dropout else min(each, shared))
