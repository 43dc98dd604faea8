"""The frozen base model of one process: loaded once, never written.

The same code opens the embedded base, a local folder and a hub name; a LLaVA, or a causal language model alone.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from fedstrata.client.checkpointing import checkpointed
from fedstrata.client.encoder import ClipTextEncoder, TokenMeanEncoder, load_encoder
from fedstrata.client.features import NoPictures, Pictured, Pictures
from fedstrata.client.fused import quick
from fedstrata.client.loading import TINY, check_language_model, find, give_back, keep_freed, open_base
from fedstrata.client.prompts import Prepared, Prompts
from fedstrata.client.vision import Kept, Vision
from fedstrata.core.config import LoraSection, ModelSection, StrategyConfig
from fedstrata.core.errors import BadInput
from fedstrata.core.privacy import token_options
from fedstrata.core.shapes import find_layout, language_model
from fedstrata.scenarios.stream import Example

__all__ = ["TINY", "BaseModel", "Embedded", "load_base"]


class BaseModel:
    """A base with its processor, text encoder and the layout of the layers that adapters change.

    Attributes:
        found: the LoRA of `lora.targets`.
        layout: what the present run trains: that, or what its method has in the place of it (`train_as`).
        processor: a LLaVA's; None where the base is a language model alone.
        image_token: the image tag's token; None where the base sees no pictures.
    """

    def __init__(self, section: ModelSection, lora: LoraSection, projector: str = "frozen") -> None:
        """projector: unless frozen, it is trained: features are kept from before it and `embed` projects them.

        Raises:
            BadInput: a base that cannot be loaded whole, lacks one of lora.targets or refuses model.system.
        """
        self.folder = find(section.name)
        self.model: Any
        self.model, reader = open_base(section)
        self.device: torch.device = self.model.device
        self.name = section.name
        self.max_new_tokens = section.max_new_tokens
        self.found = self.layout = find_layout(self.model, lora.targets, projector, lora.kind)
        self._encoder_name = section.text_encoder
        self._language = language_model(self.model)
        beside = [name for name, _, _ in self.layout.modules if not name.startswith(f"{self._language}.")]
        self._beside = len(beside) == len(self.layout.modules)  # adapters on the vision side alone
        if lora.dropout and beside:
            raise BadInput("lora.dropout: must be 0 where layers outside the language model are adapted")
        self.processor: Any = reader if self.model.config.model_type == "llava" else None
        self.tokenizer: Any = reader if self.processor is None else reader.tokenizer
        self.image_token: int | None = None
        self.pictures: Pictures | NoPictures = NoPictures(section.name)
        if self.processor is None:
            layers = {layer: self.module(layer) for layer, _, _ in self.layout.modules}
            check_language_model(section.name, self.model, self.backbone, layers)
        else:
            self.image_token = int(self.model.config.image_token_id)
            self.pictures = Pictures(Vision(self.model, reader, section.image_fit, Kept.of(self.layout)))
        self.prompts = Prompts(reader, self.image_token, section.system)
        give_back()
        keep_freed()

    @cached_property
    def encoder(self) -> TokenMeanEncoder | ClipTextEncoder:
        """The text encoder for identity tokens; loaded when a method first asks for it."""
        embedding = self.model.get_input_embeddings().weight
        return load_encoder(self._encoder_name, self.folder, self.tokenizer, embedding)

    def train_as(self, strategy: StrategyConfig) -> None:
        """Runs of one base follow each other in a process, and what each trains is its method's."""
        from fedstrata.client.identity import identity  # it needs this module

        hidden, token = self.model.config.get_text_config().hidden_size, token_options(strategy).token
        self.layout = strategy.trains(self.found, hidden, lambda: identity(self, token).dim)

    def encode(self, examples: Sequence[Example], token: str = "text") -> torch.Tensor:
        """What examples are about, [n, D]; token: text | image | both."""
        from fedstrata.client.identity import identity

        return identity(self, token).encode(examples)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over names, types, shapes and values of the weights, 16 hex digits."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            sha.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
            sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())  # read in place, not copied
        return sha.hexdigest()[:16]

    def module(self, name: str) -> nn.Module:
        return cast(nn.Module, self.model.get_submodule(name))

    @cached_property
    def spread(self) -> float:
        """Standard deviation of the numbers in the token embeddings: the unit of prompts."""
        return float(self.model.get_input_embeddings().weight.detach().float().std())

    @property
    def sight(self) -> int:
        """Numbers of the vision tower's feature of one picture token."""
        layers, tower = self.model.config.vision_feature_layer, self.model.config.vision_config
        return int(tower.hidden_size) * (len(layers) if isinstance(layers, list | tuple) else 1)

    @property
    def backbone(self) -> Any:
        """The language model without its head: inputs_embeds [B, L, hidden] → last_hidden_state of the same shape."""
        return self.module(self._language)

    @property
    def head(self) -> Any:
        """Hidden states [..., hidden] → logits [..., vocabulary]."""
        return self.model.get_output_embeddings()

    @contextmanager
    def training(self, checkpointing: bool) -> Iterator[None]:
        """Open while a cohort trains. checkpointing: a layer's activations are computed again for its gradient.

        Raises:
            BadInput: checkpointing, and layers that are not fit for it.
        """
        with quick(self.backbone), checkpointed(self.backbone) if checkpointing else nullcontext():
            yield

    def prompt(self, example: Example) -> str:
        """The chat template around the question, ready for the answer."""
        return self.prompts.text(example)

    def prepare(self, examples: Sequence[Example], max_length: int, overlong: str = "refuse") -> list[Prepared]:
        """Tokens and frozen image features of examples.

        Raises:
            BadInput: an example longer than `max_length` tokens, or one whose text holds the image tag's token.
        """
        features = self.image_features(examples)
        prepared = self.tokenise(examples, max_length, overlong)
        return [replace(row, features=f) for row, f in zip(prepared, features, strict=True)]

    def tokenise(self, examples: Sequence[Example], max_length: int, overlong: str = "refuse") -> list[Prepared]:
        """The same without features: a share's features can be gigabytes."""
        patches = self.pictures.count(examples)
        return [self.prompts.prepare(example, patches, max_length, overlong) for example in examples]

    def image_features(self, examples: Sequence[Pictured]) -> list[torch.Tensor | None]:
        """Per example its frozen image features, from a bounded cache; None without image."""
        return self.pictures.of(examples)

    def embed(self, rows: Sequence[Sequence[int]], features: Sequence[torch.Tensor | None], left: bool) -> "Embedded":
        """Pads token rows to one length (on the left for generation) and puts the image features in their places.

        What is trained of the vision side runs here, for every row, so that each client's rows meet its own.
        """
        length = max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        spare = [length - len(row) for row in rows]
        padded = [[pad] * k + [*row] if left else [*row] + [pad] * k for row, k in zip(rows, spare, strict=True)]
        marks = [[0] * k + [1] * (length - k) if left else [1] * (length - k) + [0] * k for k in spare]
        ids, mask = (torch.from_numpy(np.array(numbers)).to(self.device) for numbers in (padded, marks))
        embeds = self.model.get_input_embeddings()(ids)
        given = [feature for feature in self.pictures.finish(features) if feature is not None]
        if given:
            places = ((ids == self.image_token) & (mask == 1)).unsqueeze(-1).expand_as(embeds)
            embeds = embeds.masked_scatter(places, torch.cat(given).to(embeds.dtype))
        if self._beside and torch.is_grad_enabled() and not embeds.requires_grad:
            embeds.requires_grad_()  # nothing here meets an adapter, and its gradient is 0
        return Embedded(embeds, mask)


@dataclass(frozen=True)
class Embedded:
    """inputs_embeds [B, L, hidden] and attention mask [B, L]."""

    embeds: torch.Tensor
    mask: torch.Tensor


@lru_cache(maxsize=2)
def load_base(model: str, lora: str, projector: str = "frozen") -> BaseModel:
    """The process's base model for these config sections (JSON, so that equal sections share one load)."""
    return BaseModel(ModelSection(**json.loads(model)), LoraSection(**json.loads(lora)), projector)
