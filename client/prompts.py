"""From an example to token ids: the chat template, further turns, and what happens to a text that is too long."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedstrata.core.errors import BadInput
from fedstrata.scenarios.stream import Example, ImageSource

Turn = dict[str, Any]
PLAIN = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + ' ' }}"
    "{% elif m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""The template of a language model that ships none: `USER: what? ASSISTANT: that</s>`, a system sentence before it."""


@dataclass(frozen=True)
class Prepared:
    """One example as tokens; the image tag's token stands once for each of the picture's features."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]  # what follows the prompt: the answer with its end-of-sequence token, then further turns
    supervised: tuple[bool, ...]  # per token of `answer`: it belongs to an answer, not to a further question
    image: ImageSource | None = None
    features: torch.Tensor | None = None  # [image tokens, hidden] where they were asked for
    query: torch.Tensor | None = None  # [D] what a method's local half wants to know of the example


class Prompts:
    """A base's chat template around questions, ready for the answer."""

    def __init__(self, reader: Any, image_token: int | None, system: str = "") -> None:
        """`reader` is a processor and `image_token` the image tag's token, or a tokenizer and None: text alone.

        Raises:
            BadInput: no end-of-sequence token, or a system sentence for which the template has no place.
        """
        self.reader, self.image_token = reader, image_token
        self.tokenizer = reader if image_token is None else reader.tokenizer
        if self.tokenizer.eos_token_id is None:
            raise BadInput("model.name: the base's tokenizer has no end-of-sequence token, which ends every answer")
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
            asked, said = self._pair(self._later(question), reply, special=False)
            answer += asked + said
            supervised += [False] * len(asked) + [True] * len(said)
        if self.image_token is not None:
            prompt = self._opened(example, prompt, answer, patches, self.image_token)
        return Prepared(tuple(prompt), tuple(answer), tuple(supervised), example.image)

    def _opened(self, example: Example, prompt: list[int], answer: list[int], patches: int, tag: int) -> list[int]:
        """The prompt with the image tag's token once for each of the picture's features."""
        if prompt.count(tag) != (example.image is not None):
            raise BadInput(f"example {example.id}: the question must not hold the image tag's token")
        if tag in answer:
            raise BadInput(f"example {example.id}: no answer and no further turn may hold the image tag's token")
        if example.image is not None:
            at = prompt.index(tag)
            prompt[at : at + 1] = [tag] * patches
        return prompt

    def _pair(self, text: str, answer: str, special: bool) -> tuple[list[int], list[int]]:
        """Ids of a rendered question and of its answer with the end-of-sequence token.

        special: the start of the sequence, where the tokenizer adds its own tokens unless the template did so; a
        later turn has none.
        """
        begun = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        if begun and not special:
            text = text.removeprefix(self.tokenizer.bos_token)
        special = special and not begun
        gap = "" if text[-1:].isspace() else " "
        asked: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        # tokenised together, since some tokenizers merge over the border; the tokens behind the prompt's are the answer
        whole: list[int] = self.tokenizer(f"{text}{gap}{answer}", add_special_tokens=special)["input_ids"]
        return list(asked), [*whole[len(asked) :], self.tokenizer.eos_token_id]

    def _later(self, question: str) -> str:
        """What a further question adds to a conversation: some templates begin one with words of their own."""
        before = [_turn("user", "?"), _turn("assistant", "!")]
        start, whole = self._render(before, ask=False), self._render([*before, _turn("user", question)])
        return whole.removeprefix(start) if whole.startswith(start) else self._render([_turn("user", question)])

    def _render(self, turns: Sequence[Turn], ask: bool = True) -> str:
        """ask: with the words that call for an answer."""
        options: dict[str, Any] = {"add_generation_prompt": ask, "tokenize": False}
        if self.image_token is None:  # a tokenizer's template knows no parts, and may not exist
            turns = [{**turn, "content": "".join(part["text"] for part in turn["content"])} for turn in turns]
            options["chat_template"] = self.tokenizer.chat_template or PLAIN
        return str(self.reader.apply_chat_template(list(turns), **options))

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
