"""The vision side of a LLaVA: as much of it as is frozen runs once per picture, the rest in every forward pass.

What is frozen depends on what is trained: nothing of the vision side, and pictures are kept as what the language model
reads; its projector, and they are kept from before it; its tower, and they are kept as pixels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from enum import Enum
from typing import Any, cast

import torch
from PIL import Image

from fedstrata.core.adapters import Layout
from fedstrata.core.shapes import PROJECTOR, TOWER
from fedstrata.scenarios.stream import ImageSource


class Kept(Enum):
    """How far pictures are computed once and for all."""

    PIXELS = 1  # [3, height, width]
    TOWER = 2  # [image tokens, tower's hidden]
    PROJECTED = 3  # [image tokens, hidden]

    @staticmethod
    def of(layout: Layout) -> "Kept":
        """As far as `layout` leaves the base frozen."""
        names = [f".{name}" for name, *_ in (*layout.modules, *layout.dense)]
        if any(f".{TOWER}." in name for name in names):
            return Kept.PIXELS
        return Kept.TOWER if any(f".{PROJECTOR}." in name for name in names) else Kept.PROJECTED


class Vision:
    """The vision tower and projector of a LLaVA, with its image processor.

    fit: processor: pictures are resized and cut as the processor's settings say; pad: first made square.
    """

    def __init__(self, model: Any, processor: Any, fit: str, kept: Kept) -> None:
        self.model, self.processor, self.fit, self.kept = model, processor, fit, kept

    @torch.no_grad()
    def compute(self, sources: Sequence[ImageSource]) -> list[torch.Tensor]:
        """The pictures as they are kept."""
        pixels = self._pixels([self.fitted(source.open()) for source in sources])
        if self.kept is Kept.PIXELS:
            return [pixel.clone() for pixel in pixels]
        with nullcontext() if self.kept is Kept.PROJECTED else _bare(self.model):
            return [output.clone() for output in self._see(pixels)]

    def finish(self, features: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
        """What the language model reads, [image tokens, hidden] per row: the trained part of the vision side runs here.

        It runs for every row, so that client c owns the c-th equal part of the rows; rows without a picture pass as
        zeros, which nothing reads.
        """
        first = next((feature for feature in features if feature is not None), None)
        if first is None or self.kept is Kept.PROJECTED:
            return features
        zeros = torch.zeros_like(first)
        rows = torch.stack([zeros if feature is None else feature for feature in features])
        done = self._see(rows) if self.kept is Kept.PIXELS else projector_of(self.model)(rows)
        return [None if feature is None else row for feature, row in zip(features, done, strict=True)]

    @torch.no_grad()
    def glance(self, sources: Sequence[ImageSource]) -> list[torch.Tensor]:
        """The mean of the frozen tower's tokens of each picture, [tower's hidden] fp32 on the CPU."""
        with _bare(self.model):
            seen = self._see(self._pixels([self.fitted(source.open()) for source in sources]))
        return [tokens.float().mean(0).cpu() for tokens in seen]

    @torch.no_grad()
    def tokens(self) -> int:
        """Image tokens of a picture, from a blank one, before any adapter is on the tower."""
        return len(self._see(self._pixels([Image.new("RGB", (64, 64))]))[0])

    def fitted(self, picture: Image.Image) -> Image.Image:
        """Padded on two sides to a square, as LLaVA-1.5 does it and as FCIT's boxes count."""
        if self.fit != "pad" or picture.width == picture.height:
            return picture
        side = max(picture.size)
        mean = tuple(int(value * 255) for value in self.processor.image_processor.image_mean)
        square = Image.new("RGB", (side, side), cast(tuple[int, int, int], mean))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return square

    def _pixels(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        pixels = self.processor.image_processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        return cast(torch.Tensor, pixels.to(self.model.device, self.model.dtype))

    def _see(self, pixels: torch.Tensor) -> Sequence[torch.Tensor]:
        outputs = self.model.get_image_features(pixel_values=pixels, return_dict=True)
        return cast(Sequence[torch.Tensor], outputs.pooler_output)


@contextmanager
def _bare(model: Any) -> Iterator[None]:
    """While open, the projector hands on what it is given: transformers' own selection of the tower's layers holds.

    It does not run at all: adapters on its layers expect the rows of a batch, not some pictures.
    """
    projector = projector_of(model)
    projector.forward = lambda features: features
    try:
        yield
    finally:
        del projector.forward  # the class's own again


def projector_of(model: Any) -> torch.nn.Module:
    """The multimodal projector of a LLaVA."""
    return cast(torch.nn.Module, getattr(model.model, PROJECTOR))
