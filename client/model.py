"""The frozen base model of one process: loaded once, never written.

The same code opens the embedded base, a local LLaVA folder and a hub name.
"""

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fedstrata.client.encoder import ClipTextEncoder, TokenMeanEncoder, load_encoder
from fedstrata.core.adapters import Layout
from fedstrata.core.config import LoraSection, ModelSection
from fedstrata.core.errors import BadInput
from fedstrata.scenarios.stream import Example

TINY = Path(__file__).parent / "tiny"
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
IMAGE_CACHE_BYTES = 512 * 2**20  # frozen image features kept per process


@dataclass(frozen=True)
class Prepared:
    """One example as tokens; the image tag's token stands once for each of the picture's features."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]  # ends with the end-of-sequence token
    features: torch.Tensor | None  # [image tokens, hidden]


class BaseModel:
    """A LLaVA with its processor, text encoder and the layout of the layers that adapters change."""

    def __init__(self, section: ModelSection, lora: LoraSection) -> None:
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
        self.layout = find_layout(self.model, lora.targets)
        self._encoder_name = section.text_encoder
        self._features: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._feature_bytes = 0

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

    def prompt(self, example: Example) -> str:
        """The chat template around the question, ready for the answer."""
        parts: list[dict[str, str]] = [{"type": "text", "text": example.question}]
        if example.image is not None:
            parts.insert(0, {"type": "image"})
        turn = [{"role": "user", "content": parts}]
        return str(self.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))

    def prepare(self, examples: Sequence[Example], max_length: int) -> list[Prepared]:
        """Tokens and frozen image features of examples.

        Raises:
            BadInput: an example longer than `max_length` tokens, or one whose text holds the image tag's token.
        """
        features = self.image_features(examples)
        return [self._prepare(example, f, max_length) for example, f in zip(examples, features, strict=True)]

    def _prepare(self, example: Example, features: torch.Tensor | None, max_length: int) -> Prepared:
        text = self.prompt(example)
        prompt = self.tokenizer(text)["input_ids"]
        # tokenised together, since some tokenizers merge over the border; the tokens behind the prompt's are the answer
        whole = self.tokenizer(f"{text} {example.answer}")["input_ids"]
        answer = (*whole[len(prompt) :], self.tokenizer.eos_token_id)
        expected = 0 if features is None else 1
        if prompt.count(self.image_token) != expected:
            raise BadInput(f"example {example.id}: the question must not hold the image tag's token")
        if features is not None:
            at = prompt.index(self.image_token)
            prompt = prompt[:at] + [self.image_token] * len(features) + prompt[at + 1 :]
        if len(prompt) + len(answer) > max_length:
            came = len(prompt) + len(answer)
            raise BadInput(
                f"example {example.id}: must have at most train.max_length = {max_length} tokens, got {came}"
            )
        return Prepared(tuple(prompt), tuple(answer), features)

    @torch.no_grad()
    def image_features(self, examples: Sequence[Example]) -> list[torch.Tensor | None]:
        """Per example the projected image features [image tokens, hidden], from a bounded cache; None without image.

        The vision tower and the projector are frozen, so a picture's features are computed once per process.
        """
        keys = [None if example.image is None else example.image.key() for example in examples]
        found: dict[str, torch.Tensor] = {k: self._features[k] for k in keys if k is not None and k in self._features}
        missing = {k: e.image for k, e in zip(keys, examples, strict=True) if k is not None and k not in found}
        names = list(missing)
        for start in range(0, len(names), 64):
            chunk = names[start : start + 64]
            pictures = [cast(Any, missing[name]).open() for name in chunk]
            pixels = self.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
            pixels = pixels.to(self.device, self.model.dtype)
            outputs = self.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
            found.update(zip(chunk, (output.clone() for output in outputs), strict=True))
        self._remember({name: found[name] for name in names})
        return [None if key is None else found[key] for key in keys]

    def _remember(self, features: dict[str, torch.Tensor]) -> None:
        for key, value in features.items():
            self._features[key] = value
            self._feature_bytes += value.numel() * value.element_size()
        while self._feature_bytes > IMAGE_CACHE_BYTES and len(self._features) > 1:
            _, old = self._features.popitem(last=False)
            self._feature_bytes -= old.numel() * old.element_size()

    def embed(self, rows: Sequence[Sequence[int]], features: Sequence[torch.Tensor | None], left: bool) -> "Embedded":
        """Pads token rows to one length (on the left for generation) and puts the image features in their places."""
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
        given = [feature for feature in features if feature is not None]
        if given:
            places = ((ids == self.image_token) & (mask == 1)).unsqueeze(-1).expand_as(embeds)
            embeds = embeds.masked_scatter(places, torch.cat(given).to(embeds.dtype))
        return Embedded(embeds, mask)


@dataclass(frozen=True)
class Embedded:
    """inputs_embeds [B, L, hidden] and attention mask [B, L]."""

    embeds: torch.Tensor
    mask: torch.Tensor


def find_layout(model: nn.Module, targets: Sequence[str]) -> Layout:
    """The language model's Linear layers whose name ends with one of `targets`, as PEFT matches a list.

    Raises:
        BadInput: a target that matches no Linear layer of the language model.
    """
    modules, used = [], set()
    for name, module in model.named_modules():
        hit = next((target for target in targets if name == target or name.endswith(f".{target}")), None)
        if hit and "language_model" in name and isinstance(module, nn.Linear):
            modules.append((name, module.out_features, module.in_features))
            used.add(hit)
    if set(targets) - used:
        wrong = ", ".join(sorted(set(targets) - used))
        raise BadInput(f"lora.targets: {wrong}: no Linear layer of the language model has this name")
    return Layout(tuple(sorted(modules)))


@lru_cache(maxsize=2)
def load_base(model: str, lora: str) -> BaseModel:
    """The process's base model for these config sections (JSON, so that equal sections share one load)."""
    return BaseModel(ModelSection(**json.loads(model)), LoraSection(**json.loads(lora)))


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
