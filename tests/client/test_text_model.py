"""A language model without vision as the base, from its folder to a whole run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fedstrata.client.evaluation import generate
from fedstrata.client.model import BaseModel
from fedstrata.client.training import Job, train
from fedstrata.core import shapes
from fedstrata.core.adapters import fresh
from fedstrata.core.config import LoraSection, ModelSection, TrainSection, from_dict
from fedstrata.core.errors import BadInput
from fedstrata.scenarios.stream import Example, Pixels
from fedstrata.server import configure, launch
from fedstrata.server.ask import ask
from fedstrata.server.export import export
from fedstrata.strategies.finetune import FinetuneConfig

SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(["USER: what is the capital? ASSISTANT: red blue green"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_base(folder: Path, config: Any, model: Any, template: str = "", **sizes: Any) -> Path:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    if template:
        tokenizer.chat_template = template
    more = {"num_key_value_heads": 2, "initializer_range": 0.1} | sizes
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model(config(vocab_size=len(tokenizer), **SIZES, **more, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("llama"), LlamaConfig, LlamaForCausalLM)


@pytest.fixture(scope="module")
def base(llama: Path) -> BaseModel:
    return opened(llama)


def opened(folder: Path, projector: str = "frozen", **section: Any) -> BaseModel:
    return BaseModel(ModelSection(name=str(folder), max_new_tokens=4, **section), LoraSection(), projector)


def rows(count: int) -> list[Example]:
    words = ["red", "blue green", "4"]
    return [Example(str(i), f"what is the {'big ' * (i % 3)}number {i}?", words[i % 3]) for i in range(count)]


def test_layout_is_the_same_with_and_without_weights(llama: Path, base: BaseModel) -> None:
    tree = {"model": {"name": str(llama)}, "strategy": {"name": "finetune"}}
    assert shapes.layout(from_dict(tree, FinetuneConfig)) == base.layout
    assert len(base.layout.modules) == 2 * 7
    assert all(name.startswith("model.layers.") for name, _, _ in base.layout.modules)
    assert (base.image_token, base.processor) == (None, None)


def test_without_a_template_of_its_own_the_documented_one_is_used(base: BaseModel, llama: Path) -> None:
    example = Example("a", "what?", "red", more=(("and now?", "blue"),))
    assert base.prompt(example) == "USER: what? ASSISTANT:"
    prepared = base.tokenise([example], 512)[0]
    text = base.tokenizer.decode(prepared.prompt + prepared.answer)
    assert text == "USER: what? ASSISTANT: red</s>USER: and now? ASSISTANT: blue</s>"
    assert opened(llama, system="Be brief.").prompt(example) == "Be brief. USER: what? ASSISTANT:"


def test_a_template_that_begins_the_sequence_does_so_once(tmp_path: Path) -> None:
    base = opened(make_base(tmp_path / "base", Qwen2Config, Qwen2ForCausalLM, LLAMA3))
    example = Example("a", "what?", "red", more=(("and now?", "blue"),))
    prepared = base.tokenise([example], 512)[0]
    text = base.tokenizer.decode(prepared.prompt + prepared.answer)
    assert text == "<s>[user]\nwhat?</s>[assistant]\nred</s>[user]\nand now?</s>[assistant]\nblue</s>"
    assert generate(base, rows(2), 512) == [generate(base, [row], 512)[0] for row in rows(2)]


def test_a_picture_is_refused_by_its_examples_name(base: BaseModel) -> None:
    pictured = Example("row 7", "what?", "red", Pixels(np.zeros((8, 8, 3), np.uint8)))
    rule = r"example row 7: has a picture, but model.name '.*' is a language model without vision"
    with pytest.raises(BadInput, match=rule):
        train(base, [Job([*rows(2), pictured], fresh(base.layout, 2, 0), 0)], TrainSection(), 2.0)
    with pytest.raises(BadInput, match=rule):
        generate(base, [pictured], 512)


def test_a_shared_projector_is_refused(llama: Path) -> None:
    with pytest.raises(BadInput, match=r"strategy.projector: 'shared' needs a base with a multimodal projector"):
        opened(llama, "shared")


def test_a_model_whose_logits_are_more_than_a_linear_layer_of_its_hidden_states_is_refused(tmp_path: Path) -> None:
    folder = make_base(tmp_path / "base", Gemma2Config, Gemma2ForCausalLM, head_dim=12, final_logit_softcapping=0.5)
    with pytest.raises(BadInput, match="does more than one Linear layer between"):
        opened(folder)


def test_a_model_that_sees_what_it_should_predict_is_refused(tmp_path: Path) -> None:
    folder = make_base(tmp_path / "base", BertConfig, BertLMHeadModel)
    with pytest.raises(BadInput, match="must be a causal language model .* got 'bert'"):
        opened(folder)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    folder = make_base(tmp_path / "base", LlamaConfig, LlamaForCausalLM)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))
    with pytest.raises(BadInput, match="no end-of-sequence token"):
        opened(folder)


def scenario(folder: Path, pictures: bool = False) -> Path:
    """Two tasks of Alpaca records, one after the other."""
    tasks = {}
    for task, words in {"north": ("red", "blue"), "south": ("one", "two")}.items():
        split = {"train": 24, "test": 6}
        for part, count in split.items():
            asked = [{"instruction": f"{task} {part} {i}?", "output": words[i % 2]} for i in range(count)]
            (folder / f"{task}-{part}.json").write_text(json.dumps(asked))
        tasks[task] = {part: f"{task}-{part}.json" for part in split} | {"format": "alpaca"}
    tree = {
        "tasks": tasks,
        "stages": [["north"], ["south"]],
        "partition": {"kind": "iid"},
        "defaults": {"federation": {"clients": 4, "clients_per_round": 2, "rounds_per_stage": 2}},
    }
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def test_a_run_trains_scores_resumes_answers_and_exports(llama: Path, tmp_path: Path) -> None:
    words = ["federation.grid=inprocess", "strategy.name=finetune", "lora.rank=2", "train.batch_size=4"]
    words += [f"model.name={llama}", "model.max_new_tokens=3", f"run.dir={tmp_path / 'run'}"]
    folder = launch.run(configure.resolve(str(scenario(tmp_path)), words), Console(quiet=True))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert np.array(json.loads((folder / "matrix.json").read_text())["scores"]).shape == (3, 2)
    reply = ask(folder, "north test 1?", None)
    assert reply.text
    export(folder, tmp_path / "out")
    assert plain_answer(llama, tmp_path / "out" / "subspace-0", "north test 1?") == reply.text
    launch.resume(folder, Console(quiet=True), from_stage=1)
    assert json.loads((folder / "summary.json").read_text())["final_state_sha256"] == summary["final_state_sha256"]


def plain_answer(llama: Path, adapter: Path, question: str) -> str:
    """The answer of transformers and PEFT alone."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), str(adapter))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llama)
    asked = tokenizer(f"USER: {question} ASSISTANT:", return_tensors="pt")
    out = model.generate(**asked, max_new_tokens=3, do_sample=False, pad_token_id=0)
    return tokenizer.decode(out[0, asked["input_ids"].shape[1] :], skip_special_tokens=True).strip()
