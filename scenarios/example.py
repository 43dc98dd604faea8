"""One instruction with its answer, and where its picture comes from."""

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image


class ImageSource(Protocol):
    """Where an example's picture comes from; opened only when it is needed."""

    def open(self) -> Image.Image:
        """The picture, RGB. Raises `BadInput` naming the file when it cannot be read."""

    def key(self) -> str:
        """A string that is equal for equal pictures, for caches and duplicate checks."""


@dataclass(frozen=True, eq=False)
class Pixels:
    """A generated picture: `array` is uint8 [height, width, 3]."""

    array: np.ndarray

    def open(self) -> Image.Image:
        return Image.fromarray(self.array, "RGB")

    def key(self) -> str:
        return hashlib.sha256(self.array.tobytes()).hexdigest()


@dataclass(frozen=True)
class Example:
    """One instruction: no text carries an image tag; `image` is None for a text-only task.

    Attributes:
        more: the conversation's further (question, answer) turns; all answers are trained, only the first is scored.
        references: answers that count as right where there are several (captions); empty: only `answer`.
    """

    id: str
    question: str
    answer: str
    image: ImageSource | None = None
    more: tuple[tuple[str, str], ...] = ()
    references: tuple[str, ...] = ()


def image_word(example: Example) -> str:
    """What names the example's picture on every machine: its name in the data files, or a generated one's hash."""
    if example.image is None:
        return ""
    # key() of a file holds the folder it lies in, which differs from machine to machine; its name does not
    return str(getattr(example.image, "name", "")) or example.image.key()
