"""Pictures as frozen image features, each computed once per process while a bounded cache holds it."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, cast

import torch
from PIL import Image

from fedstrata.client.prompts import Prepared
from fedstrata.core.shapes import PROJECTOR
from fedstrata.scenarios.stream import ImageSource

CACHE_BYTES = 512 * 2**20
CHUNK = 64  # pictures in one forward of the vision tower


class Pictured(Protocol):
    """An example, or one that is prepared."""

    @property
    def image(self) -> ImageSource | None: ...


class Pictures:
    """The vision tower of a LLaVA, with its projector while that is frozen.

    fit: processor: pictures are resized and cut as the processor's settings say; pad: first made square.
    projected: whether features have passed the projector: [image tokens, hidden], else [image tokens, tower's hidden].
    """

    def __init__(self, model: Any, processor: Any, fit: str, projected: bool) -> None:
        self.model, self.processor, self.fit, self.projected = model, processor, fit, projected
        self._cache: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._bytes = 0
        self._count = 0

    def of(self, examples: Sequence[Pictured]) -> list[torch.Tensor | None]:
        """Per example the features of its picture, None without one."""
        keys = [None if example.image is None else example.image.key() for example in examples]
        found: dict[str, torch.Tensor] = {k: self._cache[k] for k in keys if k is not None and k in self._cache}
        missing = {k: e.image for k, e in zip(keys, examples, strict=True) if k is not None and k not in found}
        names = list(missing)
        for start in range(0, len(names), CHUNK):
            chunk = names[start : start + CHUNK]
            found.update(zip(chunk, self._compute([cast(ImageSource, missing[name]) for name in chunk]), strict=True))
        self._remember({name: found[name] for name in names})
        return [None if key is None else found[key] for key in keys]

    def warm(self, examples: Sequence[Pictured]) -> None:
        """Fills the cache with as many of these pictures as it holds; the others are computed when they are needed."""
        sources = {example.image.key(): example.image for example in examples if example.image is not None}
        missing = [(key, source) for key, source in sources.items() if key not in self._cache]
        for start in range(0, len(missing), CHUNK):
            chunk = missing[start : start + CHUNK]
            if self._bytes + len(chunk) * self._each() > CACHE_BYTES:
                return
            features = self._compute([source for _, source in chunk])
            self._remember({key: value for (key, _), value in zip(chunk, features, strict=True)})

    def count(self, examples: Sequence[Pictured]) -> int:
        """Image tokens of a picture: the same for all; 0 while no example has one."""
        first = next((example for example in examples if example.image is not None), None)
        if not self._count and first is not None:
            self._count = len(cast(torch.Tensor, self.of([first])[0]))
        return self._count

    def _each(self) -> int:
        """Bytes of one picture's features; 0 while none is known."""
        return self._bytes // max(1, len(self._cache))

    @torch.no_grad()
    def _compute(self, sources: Sequence[ImageSource]) -> list[torch.Tensor]:
        pictures = [self._fitted(source.open()) for source in sources]
        pixels = self.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self.model.device, self.model.dtype)
        with nullcontext() if self.projected else _bare(self.model):
            outputs = self.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        return [output.clone() for output in outputs]

    def _fitted(self, picture: Image.Image) -> Image.Image:
        """Padded on two sides to a square, as LLaVA-1.5 does it and as FCIT's boxes count."""
        if self.fit != "pad" or picture.width == picture.height:
            return picture
        side = max(picture.size)
        mean = tuple(int(value * 255) for value in self.processor.image_processor.image_mean)
        square = Image.new("RGB", (side, side), cast(tuple[int, int, int], mean))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return square

    def _remember(self, features: dict[str, torch.Tensor]) -> None:
        for key, value in features.items():
            self._cache[key] = value
            self._bytes += value.numel() * value.element_size()
        while self._bytes > CACHE_BYTES and len(self._cache) > 1:
            _, old = self._cache.popitem(last=False)
            self._bytes -= old.numel() * old.element_size()


@contextmanager
def _bare(model: Any) -> Iterator[None]:
    """While open, the projector hands on what it is given: transformers' own selection of the tower's layers holds."""
    handle = projector_of(model).register_forward_hook(lambda _, args, out: args[0])
    try:
        yield
    finally:
        handle.remove()


def projector_of(model: Any) -> torch.nn.Module:
    """The multimodal projector of a LLaVA."""
    return cast(torch.nn.Module, getattr(model.model, PROJECTOR))


def features_of(pictures: Pictures, rows: Sequence[Prepared]) -> list[torch.Tensor | None]:
    """The features that rows carry, or those of their pictures."""
    carried = [row.features is not None or row.image is None for row in rows]
    return [row.features for row in rows] if all(carried) else pictures.of(rows)
