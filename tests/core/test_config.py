"""Configuration: whose word counts, and what a mistake is answered with."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fedstrata.core.config import RunConfig, build, from_dict, parse_words, read_yaml, to_dict
from fedstrata.core.errors import BadInput
from fedstrata.strategies.disco import DiscoConfig
from fedstrata.strategies.finetune import FinetuneConfig
from fedstrata.strategies.flower import StockConfig


def words(*given: str) -> RunConfig:
    return build([parse_words(given)], DiscoConfig)


def refusal(*given: str) -> str:
    with pytest.raises(BadInput) as caught:
        words(*given)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)  # one message, one line
    return str(caught.value)


def test_without_layers_the_defaults_stand() -> None:
    assert build([]) == RunConfig()


def test_words_win_over_the_recipe_and_the_recipe_over_the_defaults() -> None:
    recipe = {"lora": {"rank": 2, "alpha": 4.0}, "seed": 7}
    config = build([recipe, parse_words(["lora.rank=3"])])
    assert (config.lora.rank, config.lora.alpha, config.seed) == (3, 4.0, 7)
    assert config.train == RunConfig().train  # what nobody named


def test_of_one_key_twice_the_last_word_wins() -> None:
    assert words("lora.rank=2", "lora.rank=5").lora.rank == 5


def test_a_list_is_replaced_and_not_appended_to() -> None:
    assert words("lora.targets=[q_proj]").lora.targets == ["q_proj"]


def test_layers_are_not_changed_by_a_build() -> None:
    layer = {"federation": {"cohort_size": 3}}
    build([layer])
    assert layer == {"federation": {"cohort_size": 3}}


def test_the_options_of_a_method_are_keys_of_strategy() -> None:
    config = words("strategy.name=disco", "strategy.tau=0.5", "strategy.activation=argmax")
    assert config.strategy == DiscoConfig("disco", tau=0.5, activation="argmax")
    with pytest.raises(BadInput, match="unknown 'tau'"):
        build([parse_words(["strategy.tau=0.5"])], FinetuneConfig)


@pytest.mark.parametrize(
    ("word", "key", "near"),
    [
        ("lora.rnak=4", "lora.rnak", "rank"),
        ("federation.client=4", "federation.client", "clients"),
        ("trian.lr=1", "trian", "train"),
        ("strategy.epsilom=1", "strategy.epsilom", "epsilon"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_one(word: str, key: str, near: str) -> None:
    message = refusal(word)
    assert message.startswith(f"{key}: unknown")
    assert f"did you mean '{near}'?" in message


def test_an_unknown_key_that_is_near_to_none_lists_all() -> None:
    message = refusal("lora.zzzzzz=1")
    assert "did you mean" not in message
    assert "known: alpha, dropout, init, kind, rank, targets" in message


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("lora.rank=many", "lora.rank"),
        ("lora.rank=1.5", "lora.rank"),
        ("lora.rank=true", "lora.rank"),
        ("lora.rank=[1]", "lora.rank"),
        ("lora.rank=", "lora.rank"),
        ("train.lr=fast", "train.lr"),
        ("lora.targets=q_proj", "lora.targets"),
        ("lora.targets=[null]", "lora.targets"),
        ("lora.targets={a: 1}", "lora"),
        ("federation.cohort_size=[2]", "federation.cohort_size"),
        ("federation.cohort_size=2.5", "federation.cohort_size"),
        ("run.dir=${nowhere}", "run.dir"),
        ("lora=3", "lora"),
        ("lora=null", "lora"),
        ("strategy=disco", "strategy"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_its_key(word: str, key: str) -> None:
    assert refusal(word).startswith(f"{key}")


@pytest.mark.parametrize(
    ("word", "rule"),
    [
        ("seed=-1", "seed: must be at least 0, got -1"),
        ("lora.rank=0", "lora.rank: must be at least 1, got 0"),
        ("lora.alpha=0", "lora.alpha: must be a finite number above 0, got 0.0"),
        ("lora.targets=[]", "lora.targets: must be a list with at least one layer name, got []"),
        ("scenario.beta=0", "scenario.beta: must be a finite number above 0, got 0.0"),
        ("scenario.beta=.inf", "scenario.beta: must be a finite number above 0, got inf"),
        ("train.lr=.nan", "train.lr: must be a finite number above 0, got nan"),
        ("train.lr=.inf", "train.lr: must be a finite number above 0, got inf"),
        ("train.local_epochs=0", "train.local_epochs: must be at least 1, got 0"),
        ("train.warmup_steps=-1", "train.warmup_steps: must be at least 0, got -1"),
        ("train.warmup_ratio=1", "train.warmup_ratio: must be at least 0 and below 1, got 1.0"),
        ("train.micro_batch=-1", "train.micro_batch: must be at least 0, got -1"),
        ("train.schedule=linear", "train.schedule: must be constant or cosine, got 'linear'"),
        ("train.overlong=drop", "train.overlong: must be refuse or cut, got 'drop'"),
        ("model.image_fit=crop", "model.image_fit: must be processor or pad, got 'crop'"),
        ("lora.dropout=1", "lora.dropout: must be at least 0 and below 1, got 1.0"),
        ("lora.init=zero", "lora.init: must be uniform or normal, got 'zero'"),
        ("strategy.projector=local", "strategy.projector: must be frozen or shared or per-subspace, got 'local'"),
        ("federation.clients=0", "federation.clients: must be at least 1, got 0"),
        ("federation.clients=4", "federation.clients_per_round: must be between 1 and federation.clients (4), got 5"),
        ("federation.min_replies=6", "federation.min_replies: must be between 1 and federation.clients_per_round (5)"),
        ("federation.max_samples=0", "federation.max_samples: must be between 1 and 2147483648, got 0"),
        ("federation.grid=rai", "federation.grid: must be ray, inprocess or flower, got 'rai'"),
        ("federation.cohort_size=0", "federation.cohort_size: must be auto or a number of at least 1, got '0'"),
        ("federation.memory_budget=.inf", "federation.memory_budget: must be a finite number above 0 (GB), got inf"),
        ("federation.timeout=0", "federation.timeout: must be above 0 (seconds), got 0.0"),
        ("federation.max_failures=-1", "federation.max_failures: must be at least 0, got -1"),
        ("evaluate.split=train", "evaluate.split: must be test or val, got 'train'"),
        ("evaluate.shard=0", "evaluate.shard: must be at least 1, got 0"),
        ("track.wandb=on", "track.wandb: must be disabled, offline, online, got 'True'"),
        ("model.dtype=float16", "model.dtype: must be float32 or bfloat16, got 'float16'"),
        ("strategy.tau=1.5", "strategy.tau: must be a cosine between -1 and 1, got 1.5"),
        ("strategy.epsilon=0", "strategy.epsilon: must be above 0, got 0.0"),
        ("strategy.activation=max", "strategy.activation: must be softmax | argmax | cosine | concat, got 'max'"),
        ("strategy.min_open=0", "strategy.min_open: must be at least 1, got 0"),
    ],
)
def test_a_value_out_of_range_is_refused_with_key_rule_and_what_came(word: str, rule: str) -> None:
    assert refusal(word).startswith(rule)


def test_null_is_refused_except_where_it_means_something() -> None:
    assert refusal("lora.rank=null") == "lora.rank: must not be null"
    assert refusal("run.dir=null") == "run.dir: must not be null"
    config = words("scenario.beta=null", "federation.max_failures=null", "strategy.tau=null")
    assert isinstance(config.strategy, DiscoConfig)
    assert (config.scenario.beta, config.federation.max_failures, config.strategy.tau) == (None, None, None)


def test_a_later_null_takes_an_optional_value_back() -> None:
    assert build([{"scenario": {"beta": 2.0}}, {"scenario": {"beta": None}}]).scenario.beta is None


def test_a_word_without_an_equals_sign_or_a_key_is_refused() -> None:
    for word in ("lora.rank", "=3", ".=3"):
        assert "expected key=value" in refusal(word)


def test_a_word_may_hold_further_equals_signs() -> None:
    assert words("run.dir=a=b").run.dir == "a=b"


def test_a_word_that_is_no_yaml_value_is_refused_by_its_key() -> None:
    assert refusal("lora.targets=[q_proj").startswith("lora.targets: '[q_proj' is not a YAML value")


def test_a_key_that_is_given_a_value_and_a_key_at_once_is_refused() -> None:
    assert "a value and a key at once" in refusal("lora=3", "lora.rank=3")


def test_scientific_notation_without_a_point_is_a_number() -> None:
    assert words("train.lr=1e-3").train.lr == 0.001  # YAML 1.1 reads it as a text


def test_a_cohort_size_may_be_written_as_a_number() -> None:
    assert words("federation.cohort_size=3").federation.cohort_size == "3"


def test_a_recipe_with_a_typo_is_answered_with_the_nearest_key(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("federation:\n  clients_per_rond: 2\n", encoding="utf-8")
    with pytest.raises(BadInput, match=r"federation\.clients_per_rond: unknown .* did you mean 'clients_per_round'\?"):
        build([read_yaml(path)])


@pytest.mark.parametrize(
    ("content", "about"),
    [
        (b"lora: [", "not a readable YAML file"),
        (b"\xff\xfe\x00bad", "not a readable YAML file"),
        (b"- a\n- b\n", "must hold a mapping of keys to values, got list"),
        (b"", "must hold a mapping of keys to values, got NoneType"),
    ],
)
def test_a_recipe_that_is_no_mapping_is_refused_by_its_path(tmp_path: Path, content: bytes, about: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(BadInput) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert about in str(caught.value)


def test_a_recipe_that_is_not_there_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nothing.yaml: no such file"):
        read_yaml(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (["strategy.tau=0.25", "strategy.min_open=1"], DiscoConfig),
        (["strategy.name=joint", "strategy.subspaces=2"], FinetuneConfig),
        (["strategy.name=flwr:Any", "strategy.arguments={beta: 0.5, names: [a]}"], StockConfig),
    ],
)
def test_a_config_survives_the_way_through_json(given: list[str], kind: type[Any]) -> None:
    config = build([parse_words([*given, "seed=3", "federation.cohort_size=2", "lora.targets=[q_proj]"])], kind)
    again = from_dict(json.loads(json.dumps(to_dict(config))), kind)
    assert again == config
    assert type(again.strategy) is kind


def test_a_config_is_frozen() -> None:
    config = words("seed=1")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 2  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lora.rank = 2  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.strategy.name = "other"  # type: ignore[misc]
