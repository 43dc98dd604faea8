"""From an example to token ids: the chat template, further turns, and what happens to a text that is too long."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedstrata.core.errors import BadInput
from fedstrata.scenarios.stream import Example, ImageSource

Turn = dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """One example as tokens; the image tag's token stands once for each of the picture's features."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]  # what follows the prompt: the answer with its end-of-sequence token, then further turns
    supervised: tuple[bool, ...]  # per token of `answer`: it belongs to an answer, not to a further question
    image: ImageSource | None = None
    features: torch.Tensor | None = None  # [image tokens, hidden] where they were asked for


class Prompts:
    """A processor's chat template around questions, ready for the answer; `image_token` is the image tag's token."""

    def __init__(self, processor: Any, image_token: int, system: str = "") -> None:
        """Raises `BadInput` when there is a system sentence and the template has no place for one."""
        self.processor, self.tokenizer, self.image_token = processor, processor.tokenizer, image_token
        self.system = [_turn("system", system)] if system else []
        if system:
            self._check(system)

    def text(self, example: Example) -> str:
        """The system sentence, if any, and the first question."""
        return self._render([*self.system, _turn("user", example.question, example.image is not None)])

    def prepare(self, example: Example, patches: int, max_length: int, overlong: str = "refuse") -> Prepared:
        """Token ids of an example whose picture, if any, has `patches` features.

        overlong: cut: one that is too long loses its last further turns, whole, and then the end of its question.

        Raises:
            BadInput: longer than `max_length` tokens, or a text that holds the image tag's token.
        """
        came = self._tokens(example, patches)
        if overlong == "cut":
            while example.more and _length(came) > max_length:
                example = replace(example, more=example.more[:-1])
                came = self._tokens(example, patches)
            came = self._shorten(example, came, patches, max_length)
        if _length(came) > max_length:
            rule = f"must have at most train.max_length = {max_length} tokens"
            raise BadInput(f"example {example.id}: {rule}, got {_length(came)}")
        return came

    def _shorten(self, example: Example, came: Prepared, patches: int, max_length: int) -> Prepared:
        """The question loses tokens at its end; tokens can merge where it now ends, so the count is taken anew."""
        if _length(came) <= max_length:
            return came
        encoded = self.tokenizer(example.question, add_special_tokens=False, return_offsets_mapping=True)
        ends = [0, *(end for _, end in encoded["offset_mapping"])]
        left = len(ends) - 1
        while left and _length(came) > max_length:
            left = max(0, left - (_length(came) - max_length))
            came = self._tokens(replace(example, question=example.question[: ends[left]]), patches)
        return came

    def _tokens(self, example: Example, patches: int) -> Prepared:
        prompt, answer = self._pair(self.text(example), example.answer, special=True)
        supervised = [True] * len(answer)
        for question, reply in example.more:
            asked, said = self._pair(self._render([_turn("user", question)]), reply, special=False)
            answer += asked + said
            supervised += [False] * len(asked) + [True] * len(said)
        if prompt.count(self.image_token) != (example.image is not None):
            raise BadInput(f"example {example.id}: the question must not hold the image tag's token")
        if self.image_token in answer:
            raise BadInput(f"example {example.id}: no answer and no further turn may hold the image tag's token")
        if example.image is not None:
            at = prompt.index(self.image_token)
            prompt[at : at + 1] = [self.image_token] * patches
        return Prepared(tuple(prompt), tuple(answer), tuple(supervised), example.image)

    def _pair(self, text: str, answer: str, special: bool) -> tuple[list[int], list[int]]:
        """Ids of a rendered question and of its answer with the end-of-sequence token.

        special: the start of the sequence, where the tokenizer adds its own tokens; a later turn has none.
        """
        if not special and self.tokenizer.bos_token:
            text = text.removeprefix(self.tokenizer.bos_token)
        asked: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        # tokenised together, since some tokenizers merge over the border; the tokens behind the prompt's are the answer
        whole: list[int] = self.tokenizer(f"{text} {answer}", add_special_tokens=special)["input_ids"]
        return list(asked), [*whole[len(asked) :], self.tokenizer.eos_token_id]

    def _render(self, turns: Sequence[Turn]) -> str:
        return str(self.processor.apply_chat_template(list(turns), add_generation_prompt=True, tokenize=False))

    def _check(self, system: str) -> None:
        """The sentence must come out, and not as another role's words: some templates know only two roles."""
        user = _turn("user", "?")
        try:
            text = self._render([*self.system, user])
            others = [self._render([_turn(role, system), user]) for role in ("user", "assistant")]
        except Exception as error:  # templates refuse by raising; jinja's types are many
            raise BadInput(f"model.system: the base's chat template refuses a system role: {error}") from error
        if system not in text or text in others:
            raise BadInput("model.system: the base's chat template has no place for a system role; leave it empty")


def _turn(role: str, text: str, image: bool = False) -> Turn:
    return {"role": role, "content": [*([{"type": "image"}] if image else []), {"type": "text", "text": text}]}


def _length(prepared: Prepared) -> int:
    return len(prepared.prompt) + len(prepared.answer)
