"""What the tiny base has seen before the stream begins."""

import hashlib

from fedstrata.scenarios.mini import ANSWERS, MINI_TASKS, mini_task
from fedstrata.scenarios.pretraining import PRETRAINING_TASKS, pretraining_examples, pretraining_prompts
from fedstrata.scenarios.stream import Example

RECORDED = "04f896311a3458b7d8018a3d410024ec43ddef79796725a0b2d79597be898d6e"


def _digest(examples: list[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        image = example.image.key() if example.image else ""
        digest.update("|".join((example.id, example.question, example.answer, image)).encode())
    return digest.hexdigest()


def test_the_draw_is_the_recorded_one_to_the_byte() -> None:
    assert _digest(pretraining_examples(0, 400)) == RECORDED
    assert _digest(pretraining_examples(1, 400)) != RECORDED


def test_every_task_occurs() -> None:
    seen = {example.id.split("-")[0] for example in pretraining_examples(0, 1000)}
    assert seen == set(PRETRAINING_TASKS)
    assert not seen & set(MINI_TASKS)


def test_prompts_are_those_of_the_examples_that_have_pictures() -> None:
    prompts = pretraining_prompts(0, 20)
    assert set(prompts) == set(PRETRAINING_TASKS)
    assert all(len(questions) == 20 for questions in prompts.values())


def test_no_question_of_the_stream_is_asked() -> None:
    stream = {example.question for name in MINI_TASKS for example in mini_task(name, 0, 200, 0, 0).train}
    assert not stream & {example.question for example in pretraining_examples(0, 3000)}


def test_neither_whole_captions_nor_yes_and_no_are_ever_the_answer_to_a_picture() -> None:
    answers = {example.answer for example in pretraining_examples(0, 3000) if example.image is not None}
    assert not answers & (ANSWERS["captions"] | ANSWERS["icons"] | ANSWERS["reading"])
