"""Text encoders for identity tokens. Encoder, match threshold tau and softmax temperature epsilon are one unit."""

import json
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedstrata.core.errors import BadInput

SETTINGS, CENTER = "text_encoder.json", "text_encoder.safetensors"


def token_mean(tokenizer: Any, embedding: Tensor, questions: Sequence[str], normalize: bool) -> Tensor:
    """phi: the mean of each question's token embeddings [B, D] fp32 on the CPU, from `embedding` [V, D] wherever it is.

    Tokens without a letter or a digit are left out: every question ends in the same few marks.
    """
    rows = [_words(tokenizer, question) for question in questions]
    nothing = torch.zeros(embedding.shape[1])
    means = [embedding[row].cpu().float().mean(0) if row else nothing for row in rows]
    phi = torch.stack(means) if means else torch.zeros(0, embedding.shape[1])
    return F.normalize(phi, dim=-1) if normalize else phi


def _words(tokenizer: Any, question: str) -> list[int]:
    ids: list[int] = tokenizer(question, add_special_tokens=False)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return [index for index, token in zip(ids, tokens, strict=True) if any(c.isalnum() and c != "Ġ" for c in token)]


class TokenMeanEncoder:
    """E(x) = phi(x) - the mean of phi over the base's pre-training prompts; ships in the base's folder."""

    def __init__(self, tokenizer: Any, embedding: Tensor, folder: str | Path) -> None:
        """`embedding` is the base's own input embedding [V, D]; `folder` holds the settings and the centre."""
        folder = Path(folder)
        try:
            settings = _settings(folder)
            self.tau, self.epsilon = float(settings["tau"]), float(settings["epsilon"])
            self.dim, self.name = int(settings["dim"]), "base"
            self._normalize = bool(settings["normalize"])
            self._center = load_file(folder / CENTER)["center"].float()
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise BadInput(f"{folder}: {SETTINGS} and {CENTER} are not a readable text encoder: {error}") from error
        if embedding.shape[1] != self.dim:
            raise BadInput(f"{folder / SETTINGS}: dim is {self.dim}, the base's tokens have {embedding.shape[1]}")
        if self._center.shape != (self.dim,):
            raise BadInput(f"{folder / CENTER}: center must be [{self.dim}], got {list(self._center.shape)}")
        self._tokenizer, self._embedding = tokenizer, embedding.detach()  # the base's own, never a copy

    @cached_property
    def norm(self) -> float:
        """About the norm of a feature, from the encoder's own numbers alone: √(1 + |centre|²) where phi has norm 1."""
        square = 1.0 if self._normalize else float(self._embedding.double().pow(2).sum(1).mean())
        return math.sqrt(square + float(self._center.double().pow(2).sum()))

    @torch.no_grad()
    def encode(self, questions: Sequence[str]) -> Tensor:
        """E of each question: [B, dim] fp32."""
        return token_mean(self._tokenizer, self._embedding, questions, self._normalize) - self._center


class ClipTextEncoder:
    """A CLIP text tower's pooled feature, with the paper's tau and epsilon."""

    tau, epsilon = 0.9, 0.05

    def __init__(self, name: str) -> None:
        """`name` is a folder or a hub name."""
        from transformers import AutoTokenizer, CLIPTextModel

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name)
            self._model: Any = CLIPTextModel.from_pretrained(name, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise BadInput(f"model.text_encoder: cannot load '{name}' as a CLIP text model: {error}") from error
        self.name, self.dim = name, int(self._model.config.hidden_size)
        self._length = min(77, int(self._model.config.max_position_embeddings))

    @cached_property
    def norm(self) -> float:
        """About the norm of a feature, from the encoder's own numbers alone: √(|γ|² + |β|²) of its last LayerNorm."""
        last = getattr(self._model, "text_model", self._model).final_layer_norm
        return math.hypot(*(float(part.detach().double().norm()) for part in (last.weight, last.bias)))

    @torch.no_grad()
    def encode(self, questions: Sequence[str]) -> Tensor:
        """The pooled feature of each question, cut after 77 tokens: [B, dim] fp32."""
        if not questions:
            return torch.zeros(0, self.dim)
        batch = self._tokenizer(
            list(questions), padding=True, truncation=True, max_length=self._length, return_tensors="pt"
        )
        pooled = self._model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output
        return pooled.float()  # type: ignore[no-any-return]


def load_encoder(
    name: str, base_folder: str | Path, tokenizer: Any, embedding: Tensor
) -> TokenMeanEncoder | ClipTextEncoder:
    """The encoder that ships with the base (`name` "base"), or a CLIP text tower by folder or hub name."""
    return TokenMeanEncoder(tokenizer, embedding, base_folder) if name == "base" else ClipTextEncoder(name)


def save_encoder(folder: Path, center: Tensor, tau: float, epsilon: float, normalize: bool) -> None:
    """Writes a token-mean encoder's settings and centre [D] into a base's folder."""
    settings = {"kind": "token_mean", "dim": len(center), "tau": tau, "epsilon": epsilon, "normalize": normalize}
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_file({"center": center.float().contiguous()}, folder / CENTER)


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    if not path.is_file() or not (folder / CENTER).is_file():
        raise BadInput(
            f"model.text_encoder: 'base' needs {SETTINGS} and {CENTER} in the base's folder, {folder} has none;"
            " name a CLIP text model instead, such as openai/clip-vit-large-patch14-336"
        )
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("kind") != "token_mean":
        raise BadInput(f"{path}: kind must be 'token_mean', got {settings.get('kind')!r}")
    return settings
