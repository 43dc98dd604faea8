"""Pictures as frozen image features, each computed once per process while a bounded cache holds it."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol, cast

import torch

from fedstrata.client.prompts import Prepared
from fedstrata.client.vision import Kept, Vision
from fedstrata.core.errors import BadInput
from fedstrata.scenarios.stream import ImageSource

CACHE_BYTES = 512 * 2**20
CHUNK = 64  # pictures in one forward of the vision tower
GLANCES = 2**15  # pictures whose mean feature is kept


class Pictured(Protocol):
    """An example, or one that is prepared."""

    @property
    def image(self) -> ImageSource | None: ...


class Pictures:
    """A LLaVA's pictures, as far as its vision side is frozen."""

    def __init__(self, vision: Vision) -> None:
        self.vision = vision
        self._cache: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._bytes = 0
        self._glances: dict[str, torch.Tensor] = {}
        self._count = vision.tokens() if vision.kept is Kept.PIXELS else 0

    def of(self, examples: Sequence[Pictured]) -> list[torch.Tensor | None]:
        """Per example the features of its picture, None without one."""
        keys = [None if example.image is None else example.image.key() for example in examples]
        found: dict[str, torch.Tensor] = {k: self._cache[k] for k in keys if k is not None and k in self._cache}
        missing = {k: e.image for k, e in zip(keys, examples, strict=True) if k is not None and k not in found}
        names = list(missing)
        for start in range(0, len(names), CHUNK):
            chunk = names[start : start + CHUNK]
            found.update(
                zip(chunk, self.vision.compute([cast(ImageSource, missing[name]) for name in chunk]), strict=True)
            )
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
            features = self.vision.compute([source for _, source in chunk])
            self._remember({key: value for (key, _), value in zip(chunk, features, strict=True)})

    def count(self, examples: Sequence[Pictured]) -> int:
        """Image tokens of a picture: the same for all; 0 while no example has one."""
        first = next((example for example in examples if example.image is not None), None)
        if not self._count and first is not None:
            self._count = len(cast(torch.Tensor, self.of([first])[0]))
        return self._count

    def glance(self, examples: Sequence[Pictured]) -> list[torch.Tensor | None]:
        """Per example the mean of what the frozen tower sees in its picture [tower's hidden], None without one."""
        keys = [None if example.image is None else example.image.key() for example in examples]
        missing = {k: e.image for k, e in zip(keys, examples, strict=True) if k is not None and k not in self._glances}
        names, found = list(missing), dict(self._glances)
        for start in range(0, len(names), CHUNK):
            chunk = names[start : start + CHUNK]
            seen = self.vision.glance([cast(ImageSource, missing[name]) for name in chunk])
            found.update(zip(chunk, seen, strict=True))
        self._glances = found if len(found) <= GLANCES else {name: found[name] for name in names[-GLANCES:]}
        return [None if key is None else found[key] for key in keys]

    def finish(self, features: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
        """What the language model reads of a batch's features, [image tokens, hidden] per row."""
        return self.vision.finish(features)

    def _each(self) -> int:
        """Bytes of one picture's features; 0 while none is known."""
        return self._bytes // max(1, len(self._cache))

    def _remember(self, features: dict[str, torch.Tensor]) -> None:
        for key, value in features.items():
            self._cache[key] = value
            self._bytes += value.numel() * value.element_size()
        while self._bytes > CACHE_BYTES and len(self._cache) > 1:
            _, old = self._cache.popitem(last=False)
            self._bytes -= old.numel() * old.element_size()


class NoPictures:
    """What a language model without vision has instead: an example with a picture is refused by its id."""

    def __init__(self, name: str) -> None:
        """`name` is the base's, for the message."""
        self.name = name

    def of(self, examples: Sequence[Pictured]) -> list[torch.Tensor | None]:
        """None for each example. Raises `BadInput` when one has a picture."""
        for example in examples:
            if example.image is not None:
                which = getattr(example, "id", "with a picture")
                rule = f"has a picture, but model.name {self.name!r} is a language model without vision"
                raise BadInput(f"example {which}: {rule}")
        return [None] * len(examples)

    def warm(self, examples: Sequence[Pictured]) -> None:
        """Nothing is kept."""
        self.of(examples)

    def glance(self, examples: Sequence[Pictured]) -> list[torch.Tensor | None]:
        """None for each example. Raises `BadInput` when one has a picture."""
        return self.of(examples)

    def count(self, examples: Sequence[Pictured]) -> int:
        """No image tokens."""
        self.of(examples)
        return 0

    def finish(self, features: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
        """As they are."""
        return features


def features_of(pictures: Pictures | NoPictures, rows: Sequence[Prepared]) -> list[torch.Tensor | None]:
    """The features that rows carry, or those of their pictures."""
    carried = [row.features is not None or row.image is None for row in rows]
    return [row.features for row in rows] if all(carried) else pictures.of(rows)
