"""fcit-mini's tasks: the same bytes everywhere, splits disjoint in content, answers shared in pairs."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from fedstrata.scenarios.mini import ANSWERS, CHANCE, MINI_TASKS, mini_task
from fedstrata.scenarios.pretraining import pretraining_examples
from fedstrata.scenarios.stream import Example, Task

PAIRS = (("names", "counting"), ("charts", "reading"), ("icons", "figures"))
RECORDED = "267c4c7df0c73dfdd65d4d019f2b984bcf45dbd5ea9ae68219585f7d1f72b877"


def _task(name: str, seed: int = 0) -> Task:
    return mini_task(name, seed, 300, 100, 100)


def _key(example: Example) -> tuple[str, str]:
    assert example.image is not None
    return example.image.key(), example.question


def _digest(seed: int) -> str:
    digest = hashlib.sha256()
    for name in MINI_TASKS:
        task = mini_task(name, seed, 40, 10, 10)
        for example in (*task.train, *task.val, *task.test):
            digest.update("|".join((*_key(example), example.answer, example.id)).encode())
    return digest.hexdigest()


def test_the_draw_is_the_recorded_one_to_the_byte() -> None:
    assert _digest(0) == RECORDED
    assert _digest(1) != RECORDED


@pytest.mark.parametrize("name", MINI_TASKS)
def test_a_task_has_what_was_asked_for(name: str) -> None:
    task = _task(name)
    assert (len(task.train), len(task.val), len(task.test)) == (300, 100, 100)
    assert task.name == name
    assert task.metric == "exact_match"
    for example in (*task.train, *task.val, *task.test):
        assert example.answer in ANSWERS[name]
        assert example.image is not None
        picture = np.asarray(example.image.open())
        assert picture.shape == (32, 32, 3)
        assert picture.dtype == np.uint8


@pytest.mark.parametrize("name", MINI_TASKS)
def test_no_picture_and_question_comes_twice_nor_in_pretraining(name: str) -> None:
    task = _task(name)
    keys = [_key(example) for example in (*task.train, *task.val, *task.test)]
    assert len(set(keys)) == len(keys)
    before = pretraining_examples(0, 2000)
    assert not {picture for picture, _ in keys} & {example.image.key() for example in before if example.image}
    assert not {question for _, question in keys} & {example.question for example in before}


@pytest.mark.parametrize("name", MINI_TASKS)
def test_pictures_of_different_splits_differ(name: str) -> None:
    task = _task(name)
    train, val, test = ({_key(example)[0] for example in part} for part in (task.train, task.val, task.test))
    assert not train & val
    assert not train & test
    assert not val & test


def test_papers_of_pretraining_and_stream_never_meet() -> None:
    """Why no picture can occur in both: the stream's papers are divisible by four, the pre-training's are not."""
    for example in pretraining_examples(3, 500):
        if example.image is not None:
            reds = np.asarray(example.image.open())[..., 0]
            assert (reds % 4 == 1).any()


def test_answers_are_shared_in_pairs_that_are_not_neighbours() -> None:
    for one, other in PAIRS:
        assert ANSWERS[one] & ANSWERS[other] in (ANSWERS[one], ANSWERS[other])
        assert abs(MINI_TASKS.index(one) - MINI_TASKS.index(other)) > 1
    words = {word for caption in ANSWERS["captions"] for word in caption.split()}
    assert ANSWERS["attributes"] <= words
    assert abs(MINI_TASKS.index("captions") - MINI_TASKS.index("attributes")) > 1


@pytest.mark.parametrize("name", MINI_TASKS)
def test_chance_is_what_the_most_frequent_answer_earns(name: str) -> None:
    answers = Counter(example.answer for example in _task(name).test)
    assert max(answers.values()) / 100 <= CHANCE[name] + 0.05


@pytest.mark.parametrize("name", MINI_TASKS)
def test_the_question_does_not_give_the_answer_away(name: str) -> None:
    by_question: dict[str, Counter[str]] = {}
    for example in _task(name).train:
        by_question.setdefault(example.question, Counter())[example.answer] += 1
    guessed = sum(answers.most_common(1)[0][1] for answers in by_question.values())
    assert guessed / 300 <= CHANCE[name] + 0.15


def test_prompts_of_different_tasks_differ() -> None:
    asked = [{example.question for example in _task(name).train} for name in MINI_TASKS]
    assert sum(map(len, asked)) == len(set().union(*asked))
