"""fcit-mini-domain's tasks: the same bytes everywhere, one question a family, domains that only the picture tells."""

import hashlib
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, LlavaForConditionalGeneration

import fedstrata.client
from fedstrata.client.encoder import TokenMeanEncoder
from fedstrata.core.errors import BadInput
from fedstrata.core.seeds import generator
from fedstrata.scenarios import mini, mini_domain
from fedstrata.scenarios import mini_domain_pictures as domains
from fedstrata.scenarios.drawing import canvas
from fedstrata.scenarios.mini_domain import DOMAIN_ANSWERS, DOMAIN_TASKS, domain_task, prompts
from fedstrata.scenarios.mini_pictures import PAPERS, Combination, Drawn, Rng
from fedstrata.scenarios.pretraining import pretraining_examples
from fedstrata.scenarios.stream import Example, Task

DIGIT = tuple(name for name in DOMAIN_TASKS if name.startswith("digit"))
COUNT = tuple(name for name in DOMAIN_TASKS if name.startswith("count"))
RECORDED = "8ff5f2949e821e3017701dde361c3d19114607fced81d31fd126e55f6d7796d1"
TINY = Path(fedstrata.client.__file__).parent / "tiny"


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return {name: domain_task(name, 0, 300, 100, 150) for name in DOMAIN_TASKS}


@pytest.fixture(scope="module")
def encoder() -> TokenMeanEncoder:
    embedding = LlavaForConditionalGeneration.from_pretrained(TINY).get_input_embeddings().weight
    return TokenMeanEncoder(AutoTokenizer.from_pretrained(TINY), embedding, TINY)


def _rows(task: Task) -> list[Example]:
    return [*task.train, *task.val, *task.test]


def _key(example: Example) -> tuple[str, str]:
    assert example.image is not None
    return example.image.key(), example.question


def _digest(seed: int) -> str:
    digest = hashlib.sha256()
    for name in DOMAIN_TASKS:
        for example in _rows(domain_task(name, seed, 40, 10, 10)):
            digest.update("|".join((*_key(example), example.answer, example.id)).encode())
    return digest.hexdigest()


def test_the_draw_is_the_recorded_one_to_the_byte() -> None:
    assert _digest(0) == RECORDED
    assert _digest(1) != RECORDED


def test_three_tasks_of_either_family_by_turns() -> None:
    assert (DOMAIN_TASKS[::2], DOMAIN_TASKS[1::2]) == (DIGIT, COUNT)
    assert len(DIGIT) == len(COUNT) == 3


@pytest.mark.parametrize("name", DOMAIN_TASKS)
def test_a_task_has_what_was_asked_for(name: str, tasks: dict[str, Task]) -> None:
    task = tasks[name]
    assert (task.name, len(task.train), len(task.val), len(task.test)) == (name, 300, 100, 150)
    assert task.metric == "exact_match"
    for example in _rows(task):
        assert example.image is not None
        picture = np.asarray(example.image.open())
        assert (picture.shape, picture.dtype) == ((32, 32, 3), np.uint8)


@pytest.mark.parametrize("family", [DIGIT, COUNT])
def test_a_family_asks_one_question_and_has_one_vocabulary(family: tuple[str, ...], tasks: dict[str, Task]) -> None:
    asked = {example.question for name in family for example in _rows(tasks[name])}
    assert len(asked) == 1
    for name in family:
        assert {*prompts(name)} == asked
        assert {example.answer for example in tasks[name].test} == DOMAIN_ANSWERS[name] == DOMAIN_ANSWERS[family[0]]


def test_the_families_differ_in_question_and_share_answers() -> None:
    assert prompts(DIGIT[0]) != prompts(COUNT[0])
    assert DOMAIN_ANSWERS[COUNT[0]] < DOMAIN_ANSWERS[DIGIT[0]]


@pytest.mark.parametrize("name", DOMAIN_TASKS)
def test_answers_come_equally_often(name: str, tasks: dict[str, Task]) -> None:
    task = tasks[name]
    for rows in (task.train, task.val, task.test):
        given = Counter(example.answer for example in rows)
        assert max(given.values()) == -(-len(rows) // len(DOMAIN_ANSWERS[name]))


@pytest.mark.parametrize("name", DOMAIN_TASKS)
def test_no_picture_comes_twice_nor_in_pretraining(name: str, tasks: dict[str, Task]) -> None:
    pictures = [_key(example)[0] for example in _rows(tasks[name])]
    assert len(set(pictures)) == len(pictures)
    before = pretraining_examples(0, 1000)
    assert not set(pictures) & {_key(example)[0] for example in before if example.image}
    assert prompts(name)[0] not in {example.question for example in before}


@pytest.mark.parametrize("name", DOMAIN_TASKS)
def test_splits_are_disjoint_in_content(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    maker, drawn = mini_domain._MAKERS[name], set[Combination]()

    def spy(rng: Rng, combination: Combination) -> Drawn:
        drawn.add(combination)
        return maker.render(rng, combination)

    monkeypatch.setattr(mini_domain, "_MAKERS", {name: replace(maker, render=spy)})
    content = []
    for sizes in ((300, 0, 0), (0, 100, 0), (0, 0, 150)):
        drawn.clear()
        domain_task(name, 0, *sizes)
        content.append(set(drawn))
    assert all(len(part) >= 50 for part in content)
    assert sum(map(len, content)) == len(set().union(*content))


def test_no_surface_is_one_of_pretraining() -> None:
    """Its papers leave remainder one when the red channel is divided by four."""
    for colour in (*PAPERS, *domains.BOARDS, *(shade for cloth in domains.CLOTHS for shade in cloth)):
        assert all(channel % 4 == 0 for channel in colour)


def test_the_domains_of_a_family_differ_in_surface(tasks: dict[str, Task]) -> None:
    """The least and the greatest brightness of a picture's most common colour, per surface: no two surfaces meet."""
    for family in (DIGIT, COUNT):
        ranges = sorted(_brightness(tasks[name]) for name in family)
        assert all(below[1] < above[0] for below, above in pairwise(ranges))


def _brightness(task: Task) -> tuple[int, int]:
    grounds = []
    for example in task.test:
        assert example.image is not None
        colours = Counter(example.image.open().get_flattened_data())
        grounds.append(sum(colours.most_common(1)[0][0]))
    return min(grounds), max(grounds)


def test_a_split_that_is_used_up_is_bad_input() -> None:
    maker = mini.Maker(("What?",), lambda rng: (0,), lambda rng, _: (canvas((0, 0, 0)), "", "a"), numbered=True)
    assert len(mini.draw("one", maker, "train", generator(0), 1, 1)) == 1
    with pytest.raises(BadInput, match="one: train must be fewer, no new example came after 1, got 2"):
        mini.draw("one", maker, "train", generator(0), 2, 2)


def test_the_text_encoder_cannot_tell_domains_but_families(encoder: TokenMeanEncoder, tasks: dict[str, Task]) -> None:
    tokens = {name: encoder.encode([row.question for row in tasks[name].train]).mean(0) for name in DOMAIN_TASKS}
    for name in DOMAIN_TASKS:
        assert torch.equal(tokens[name], tokens[DIGIT[0] if name in DIGIT else COUNT[0]])
    assert float(F.cosine_similarity(tokens[DIGIT[0]], tokens[COUNT[0]], dim=0)) < encoder.tau


def test_its_questions_are_far_from_those_of_fcit_mini(encoder: TokenMeanEncoder) -> None:
    theirs = [prompt.format("first") for name in mini.MINI_TASKS for prompt in mini.prompts(name)]
    ours = F.normalize(encoder.encode([*prompts(DIGIT[0]), *prompts(COUNT[0])]), dim=-1)
    assert float((ours @ F.normalize(encoder.encode(theirs), dim=-1).T).max()) < encoder.tau
