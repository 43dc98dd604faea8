"""The frozen base model of one process: loaded once, never written.

The same code opens the embedded base, a local LLaVA folder and a hub name.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fedstrata.client.encoder import ClipTextEncoder, TokenMeanEncoder, load_encoder
from fedstrata.client.features import Pictured, Pictures, projector_of
from fedstrata.client.prompts import Prepared, Prompts
from fedstrata.core.config import LoraSection, ModelSection
from fedstrata.core.errors import BadInput
from fedstrata.core.shapes import find_layout
from fedstrata.scenarios.stream import Example

TINY = Path(__file__).parent / "tiny"
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


class BaseModel:
    """A LLaVA with its processor, text encoder and the layout of the layers that adapters change."""

    def __init__(self, section: ModelSection, lora: LoraSection, projector: str = "frozen") -> None:
        """projector: shared: it is trained, so features are kept from before it and `embed` projects them.

        Raises:
            BadInput: a base that cannot be loaded whole, lacks one of lora.targets or refuses model.system.
        """
        import transformers

        # typed loosely: transformers' own annotations of its factories do not hold under mypy strict
        loaders: Any = transformers
        loaders.utils.logging.disable_progress_bar()
        loaders.utils.logging.set_verbosity_error()  # what matters in its load report is checked below
        self.folder = _find(section.name)
        self.device = _device(section.device)
        dtype = getattr(torch, section.dtype)
        try:
            config = loaders.AutoConfig.from_pretrained(self.folder)
            if config.model_type != "llava":  # another model's folder would give a LLaVA of 7 B random weights
                raise ValueError(f"it must be of model type 'llava', got {config.model_type!r}")
            self.model: Any
            self.model, report = loaders.LlavaForConditionalGeneration.from_pretrained(
                self.folder,
                config=config,
                dtype=dtype,
                attn_implementation=section.attention,
                ignore_mismatched_sizes=True,  # so that the report names them
                output_loading_info=True,
            )
            self.processor: Any = loaders.AutoProcessor.from_pretrained(self.folder)
        except Exception as error:  # a corrupt file surfaces as one of many types, all of them the user's to mend
            raise BadInput(f"model.name: cannot load {section.name!r}: {_first_line(error)}") from error
        _check_whole(section.name, report)
        self.model.to(self.device).eval().requires_grad_(False)
        self.tokenizer: Any = self.processor.tokenizer
        self.name = section.name
        self.max_new_tokens = section.max_new_tokens
        self.image_token = int(self.model.config.image_token_id)
        self.layout = find_layout(self.model, lora.targets, projector)
        self.prompts = Prompts(self.processor, self.image_token, section.system)
        self.pictures = Pictures(self.model, self.processor, section.image_fit, projected=not self.layout.dense)
        self._encoder_name = section.text_encoder

    @cached_property
    def encoder(self) -> TokenMeanEncoder | ClipTextEncoder:
        """The text encoder for identity tokens; loaded when a method first asks for it."""
        embedding = self.model.get_input_embeddings().weight.detach().float().cpu()
        return load_encoder(self._encoder_name, self.folder, self.tokenizer, embedding)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over names, types, shapes and values of the weights, 16 hex digits."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            sha.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
            sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()[:16]

    def module(self, name: str) -> nn.Module:
        return cast(nn.Module, self.model.get_submodule(name))

    @property
    def backbone(self) -> Any:
        """The language model without its head: inputs_embeds [B, L, hidden] → last_hidden_state of the same shape."""
        return self.model.model.language_model

    @property
    def head(self) -> Any:
        """Hidden states [..., hidden] → logits [..., vocabulary]."""
        return self.model.lm_head

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

        A trained projector runs here, for every row, so that each client's rows meet its own projector.
        """
        length = max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        ids = torch.full((len(rows), length), pad, dtype=torch.long)
        mask = torch.zeros((len(rows), length), dtype=torch.long)
        for index, row in enumerate(rows):
            where = slice(length - len(row), length) if left else slice(0, len(row))
            ids[index, where] = torch.tensor(row, dtype=torch.long)
            mask[index, where] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        embeds = self.model.get_input_embeddings()(ids)
        given = [feature for feature in self._project(features) if feature is not None]
        if given:
            places = ((ids == self.image_token) & (mask == 1)).unsqueeze(-1).expand_as(embeds)
            embeds = embeds.masked_scatter(places, torch.cat(given).to(embeds.dtype))
        return Embedded(embeds, mask)

    def _project(self, features: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
        """Rows without a picture pass as zeros, which nothing reads: client c owns the c-th equal part of the rows."""
        first = next((feature for feature in features if feature is not None), None)
        if first is None or not self.layout.dense:
            return features
        zeros = torch.zeros_like(first)
        rows = projector_of(self.model)(torch.stack([zeros if f is None else f for f in features]))
        return [None if f is None else row for f, row in zip(features, rows, strict=True)]


@dataclass(frozen=True)
class Embedded:
    """inputs_embeds [B, L, hidden] and attention mask [B, L]."""

    embeds: torch.Tensor
    mask: torch.Tensor


@lru_cache(maxsize=2)
def load_base(model: str, lora: str, projector: str = "frozen") -> BaseModel:
    """The process's base model for these config sections (JSON, so that equal sections share one load)."""
    return BaseModel(ModelSection(**json.loads(model)), LoraSection(**json.loads(lora)), projector)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("model.device: 'cuda' was asked for, but torch finds no GPU here")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _find(name: str) -> str:
    """The embedded base's folder, a folder, or a hub name as it is; anything else never reaches the network."""
    if name == "tiny":
        return str(TINY)
    if not Path(name).is_dir() and not HUB_NAME.fullmatch(name):
        raise BadInput(f"model.name: must be 'tiny', a folder or a hub name (owner/name), got {name!r}")
    return name


def _check_whole(name: str, report: Any) -> None:
    """transformers fills weights that are missing or of another shape with random numbers and only remarks on it."""
    names = [*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])]
    if names:
        fault = f"weights are missing or of another shape than its config says ({len(names)})"
        raise BadInput(f"model.name: cannot load {name!r}: {fault}: {', '.join(sorted(names)[:3])}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
