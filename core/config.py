"""A run's configuration: frozen dataclasses, filled from defaults ← scenario defaults ← recipe ← `key=value` words.

`load` is the only place that knows OmegaConf; everything behind it holds plain frozen dataclasses.
"""

import dataclasses
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedstrata.core.errors import BadInput, unknown

if TYPE_CHECKING:
    from fedstrata.core.adapters import Layout

PROJECTORS = ("frozen", "shared")
UPLOADS = ("float32", "bfloat16", "int8")
QUANTISED = ("none", "8bit", "4bit")
MATMULS = ("auto", "default", "onednn")
KINDS = ("lora", "rslora", "dora", "ia3")
MULTIPLIER = "0 or a finite number of at least 0.001"


def require(holds: bool, key: str, rule: str, came: object) -> None:
    """Raises `BadInput` naming the key, the rule and what came, unless the rule `holds`."""
    if not holds:
        raise BadInput(f"{key}: must be {rule}, got {came!r}")


def multiplier(noise: float) -> bool:
    """Whether a number can be a noise multiplier: less is no privacy that anybody could account for."""
    return noise == 0 or 1e-3 <= noise < float("inf")


@dataclass(frozen=True)
class RunSection:
    """Where the run folder is; empty: `runs/<scenario>-<strategy>-seed<seed>`, numbered when taken."""

    dir: str = ""


@dataclass(frozen=True)
class StrategyConfig:
    """What every method has; a method adds its own options by inheriting (`strategy.<option>`)."""

    name: str = "disco"
    projector: str = "frozen"  # frozen | shared: trained by every client, averaged over all participants

    projectors: ClassVar[tuple[str, ...]] = PROJECTORS  # that the method knows

    def __post_init__(self) -> None:
        """A method's own `__post_init__` begins with `super().__post_init__()`."""
        require(self.projector in self.projectors, "strategy.projector", " or ".join(self.projectors), self.projector)

    def trains(self, lora: "Layout", hidden: int, features: Callable[[], int]) -> "Layout":
        """What is trained: the LoRA of `lora.targets`, or a method's own kind of adapter in its place.

        hidden: width of the language model; features: gives the length of an identity feature, as a text encoder has
        to be opened for it.
        """
        return lora

    @property
    def averages(self) -> bool:
        """Whether these options leave a method that averages at means weighted by num-examples."""
        return True


@dataclass(frozen=True)
class ScenarioSection:
    """What is learned, when, by whom."""

    name: str = "fcit-mini"  # a packaged scenario or the path of a scenario file
    root: str = ""  # the folder that a scenario's relative paths start from; empty: the file's own folder
    beta: float | None = None  # Dirichlet concentration of the partition (smaller: more skew); null: the scenario's

    def __post_init__(self) -> None:
        require(
            self.beta is None or 0 < self.beta < float("inf"), "scenario.beta", "a finite number above 0", self.beta
        )


@dataclass(frozen=True)
class FederationSection:
    """Who takes part, how often, and on which grid."""

    clients: int = 20
    clients_per_round: int = 5
    rounds_per_stage: int = 5
    sampling: str = "seeded"  # seeded: by the run's seed; fcit: the published sequence, whatever the seed
    grid: str = "ray"  # ray | inprocess | flower
    actors: int = 0  # processes that hold a base model; 0: one per core, at most one per cohort
    cohort_size: str = "auto"  # clients trained in one fused pass: a number, or auto (a pure function of the config)
    threads: int = 1  # torch threads in every actor; more than 1 slows tiny models down
    memory_budget: float = 4.0  # GB an actor may use for a cohort; bounds cohort_size=auto
    ray_address: str = ""  # an existing Ray cluster; empty: start one on this machine
    min_replies: int = 1  # fewer good replies than this and the round is skipped
    max_failures: int | None = None  # more failed or rejected replies in one round end the run; null: none do
    clip: str = "off"  # off | median: no update moves further than the median of its round
    update_clip: float = 0.0  # largest norm of a client's update; 0: no limit
    update_noise: float = 0.0  # z of the Gaussian noise that the server adds to a mean of clipped updates; 0: none
    update_delta: float = 1e-5  # δ of the epsilon that is reported of it
    upload: str = "float32"  # float32 | bfloat16 | int8: what clients send; smaller ones send differences
    timeout: float = 3600.0  # seconds the server waits for the replies of one exchange
    cohort_timeout: float = 0.0  # seconds an actor may take for one cohort before another one gets it; 0: no limit
    max_samples: int = 1_000_000  # examples that a client with its own data may say it holds of one task

    def __post_init__(self) -> None:
        key = "federation."
        require(self.clients >= 1, key + "clients", "at least 1", self.clients)
        require(
            1 <= self.clients_per_round <= self.clients,
            key + "clients_per_round",
            f"between 1 and federation.clients ({self.clients})",
            self.clients_per_round,
        )
        require(self.sampling in ("seeded", "fcit"), key + "sampling", "seeded or fcit", self.sampling)
        require(self.rounds_per_stage >= 1, key + "rounds_per_stage", "at least 1", self.rounds_per_stage)
        require(self.grid in ("ray", "inprocess", "flower"), key + "grid", "ray, inprocess or flower", self.grid)
        require(self.actors >= 0, key + "actors", "at least 0", self.actors)
        good = self.cohort_size == "auto" or (self.cohort_size.isdecimal() and int(self.cohort_size) >= 1)
        require(good, key + "cohort_size", "auto or a number of at least 1", self.cohort_size)
        require(self.threads >= 1, key + "threads", "at least 1", self.threads)
        budget = self.memory_budget
        require(0 < budget < float("inf"), key + "memory_budget", "a finite number above 0 (GB)", budget)
        require(
            1 <= self.min_replies <= self.clients_per_round,
            key + "min_replies",
            f"between 1 and federation.clients_per_round ({self.clients_per_round})",
            self.min_replies,
        )
        require(
            self.max_failures is None or self.max_failures >= 0, key + "max_failures", "at least 0", self.max_failures
        )
        require(self.clip in ("off", "median"), key + "clip", "off or median", self.clip)
        self._check_privacy()
        require(self.upload in UPLOADS, key + "upload", ", ".join(UPLOADS), self.upload)
        require(self.timeout > 0, key + "timeout", "above 0 (seconds)", self.timeout)
        require(self.cohort_timeout >= 0, key + "cohort_timeout", "at least 0 (seconds)", self.cohort_timeout)
        require(1 <= self.max_samples <= 2**31, key + "max_samples", f"between 1 and {2**31}", self.max_samples)

    def _check_privacy(self) -> None:
        key, clip, noise = "federation.update_", self.update_clip, self.update_noise
        require(0 <= clip < float("inf"), key + "clip", "a finite number of at least 0", clip)
        require(clip == 0 or self.clip == "off", key + "clip", f"0 with federation.clip={self.clip}", clip)
        require(multiplier(noise), key + "noise", MULTIPLIER, noise)
        require(noise == 0 or clip > 0, key + "noise", "0 without federation.update_clip, which scales it", noise)
        require(0 < self.update_delta < 1, key + "delta", "above 0 and below 1", self.update_delta)


@dataclass(frozen=True)
class ModelSection:
    """The frozen base model."""

    name: str = "tiny"  # the embedded base, a local folder, or a hub name (llava-hf/llava-1.5-7b-hf)
    text_encoder: str = "base"  # the encoder shipped with the base, or a CLIP folder or hub name
    dtype: str = "float32"  # float32 | bfloat16: of the frozen base; adapters are always float32
    quantise: str = "none"  # none | 8bit | 4bit: of the frozen base, through bitsandbytes
    matmul: str = "auto"  # auto | default | onednn: float32 products on a CPU; auto is measured once and written down
    device: str = "auto"  # auto | cpu | cuda
    attention: str = "eager"  # eager is fastest for short sequences; sdpa for long ones
    max_new_tokens: int = 16  # of a generated answer
    system: str = ""  # a sentence before the first user turn, through the processor's chat template (role system)
    image_fit: str = "processor"  # processor: as its settings say; pad: first to a square in its mean colour

    def __post_init__(self) -> None:
        require(self.name != "", "model.name", "'tiny', a folder or a hub name", self.name)
        require(self.dtype in ("float32", "bfloat16"), "model.dtype", "float32 or bfloat16", self.dtype)
        require(self.quantise in QUANTISED, "model.quantise", ", ".join(QUANTISED), self.quantise)
        require(self.matmul in MATMULS, "model.matmul", ", ".join(MATMULS), self.matmul)
        require(self.device in ("auto", "cpu", "cuda"), "model.device", "auto, cpu or cuda", self.device)
        require(self.attention in ("eager", "sdpa"), "model.attention", "eager or sdpa", self.attention)
        require(self.max_new_tokens >= 1, "model.max_new_tokens", "at least 1", self.max_new_tokens)
        require(self.image_fit in ("processor", "pad"), "model.image_fit", "processor or pad", self.image_fit)


@dataclass(frozen=True)
class LoraSection:
    """One subspace's low-rank adapter: ΔW = γ B A with γ = alpha / rank, with rslora alpha / √rank."""

    kind: str = "lora"  # lora | rslora: fused cohorts; dora | ia3: through PEFT, one client at a time
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0  # on the input of A while training, as PEFT's lora_dropout
    init: str = "uniform"  # of A: uniform: ±1/√in as PEFT draws it; normal: N(0, 0.01²); B is 0 in both
    targets: list[str] = field(  # suffixes of the language model's Linear layers; with a dot, of any other's
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )

    def __post_init__(self) -> None:
        require(self.kind in KINDS, "lora.kind", ", ".join(KINDS), self.kind)
        require(self.rank >= 1, "lora.rank", "at least 1", self.rank)
        require(0 < self.alpha < float("inf"), "lora.alpha", "a finite number above 0", self.alpha)
        require(0 <= self.dropout < 1, "lora.dropout", "at least 0 and below 1", self.dropout)
        require(self.init in ("uniform", "normal"), "lora.init", "uniform or normal", self.init)
        require(len(self.targets) > 0, "lora.targets", "a list with at least one layer name", self.targets)
        good = self.kind != "ia3" or self.dropout == 0
        require(good, "lora.dropout", "0 with lora.kind=ia3, which has none", self.dropout)

    @property
    def scaling(self) -> float:
        """γ in ΔW = γ B A, of a subspace's rank: one adapter of rank K·r is scaled as the K subspaces it stands for."""
        return self.alpha / (math.sqrt(self.rank) if self.kind == "rslora" else self.rank)


@dataclass(frozen=True)
class TrainSection:
    """Local training of one client in one round: a fresh AdamW, warm-up, then a constant or a falling learning rate.

    Step s of w warm-up steps runs at lr · s / w, so that no step has learning rate 0. FCIT's published code, as the
    usual trainers, runs it at lr · (s − 1) / w: there a client with one step does not move at all.
    """

    lr: float = 3e-3
    batch_size: int = 16
    micro_batch: int = 0  # most rows of a client in one forward, to save memory; 0: the whole batch at once
    checkpointing: bool = False  # gradient checkpointing: less memory, one more forward per step
    local_epochs: int = 4
    schedule: str = "constant"  # after warm-up; cosine: from lr towards 0 over the client's own steps, never 0
    warmup_steps: int = 3
    warmup_ratio: float = 0.0  # above 0: warm-up is ceil(ratio · the client's steps), and warmup_steps is not used
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # per client; 0: no clipping
    max_length: int = 512  # tokens of an example, image tokens included
    overlong: str = "refuse"  # refuse | cut: what is too long loses further turns, then the end of its question

    def __post_init__(self) -> None:
        require(0 < self.lr < float("inf"), "train.lr", "a finite number above 0", self.lr)
        for key in ("batch_size", "local_epochs", "max_length"):
            require(getattr(self, key) >= 1, f"train.{key}", "at least 1", getattr(self, key))
        for key in ("warmup_steps", "weight_decay", "max_grad_norm", "micro_batch"):
            require(getattr(self, key) >= 0, f"train.{key}", "at least 0", getattr(self, key))
        require(self.schedule in ("constant", "cosine"), "train.schedule", "constant or cosine", self.schedule)
        require(0 <= self.warmup_ratio < 1, "train.warmup_ratio", "at least 0 and below 1", self.warmup_ratio)
        require(self.overlong in ("refuse", "cut"), "train.overlong", "refuse or cut", self.overlong)


@dataclass(frozen=True)
class EvaluateSection:
    """How the accuracy matrix is scored."""

    split: str = "test"  # test | val; tune on val, report on test
    shard: int = 50  # examples of one evaluate message: fixed, so that scores do not depend on the actors
    batch_size: int = 50
    pretrained: str = ""  # a scenario of tasks that the base could do before, scored once more at a run's end
    unseen: str = ""  # a scenario of which the tasks that the run does not have are scored at its end, zero-shot

    def __post_init__(self) -> None:
        require(self.split in ("test", "val"), "evaluate.split", "test or val", self.split)
        require(self.shard >= 1, "evaluate.shard", "at least 1", self.shard)
        require(self.batch_size >= 1, "evaluate.batch_size", "at least 1", self.batch_size)


@dataclass(frozen=True)
class TrackSection:
    """Experiment tracking; events.jsonl is always written."""

    wandb: str = "disabled"  # disabled | offline | online
    project: str = "fedstrata"

    def __post_init__(self) -> None:
        modes = ("disabled", "offline", "online")
        require(self.wandb in modes, "track.wandb", ", ".join(modes), self.wandb)


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run. Two runs with equal configs have equal results."""

    seed: int = 0
    run: RunSection = field(default_factory=RunSection)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    scenario: ScenarioSection = field(default_factory=ScenarioSection)
    federation: FederationSection = field(default_factory=FederationSection)
    model: ModelSection = field(default_factory=ModelSection)
    lora: LoraSection = field(default_factory=LoraSection)
    train: TrainSection = field(default_factory=TrainSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    track: TrackSection = field(default_factory=TrackSection)

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", "at least 0", self.seed)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars, for YAML, JSON and the wire."""
    return dataclasses.asdict(config)


def parse_words(words: Sequence[str]) -> dict[str, Any]:
    """`["lora.rank=4"]` → `{"lora": {"rank": 4}}`; values are read as YAML."""
    tree: dict[str, Any] = {}
    for word in words:
        key, separator, text = word.partition("=")
        if not separator or not key.strip("."):
            raise BadInput(f"{word!r}: expected key=value, for example lora.rank=4")
        try:
            value = yaml.safe_load(text) if text else ""
        except (ValueError, yaml.YAMLError) as error:
            raise BadInput(f"{key}: {text!r} is not a YAML value ({error.__class__.__name__})") from error
        _put(tree, key.split("."), value)
    return tree


def _put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    node = tree
    for part in path[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise BadInput(f"{'.'.join(path)}: {part} is given a value and a key at once")
    node[path[-1]] = value


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping. Raises `BadInput` naming the file for anything else."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise BadInput(f"{path}: not a readable YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise BadInput(f"{path}: must hold a mapping of keys to values, got {type(tree).__name__}")
    return tree


def build(layers: Sequence[Mapping[str, Any]], strategy_type: type[StrategyConfig] = StrategyConfig) -> RunConfig:
    """Merges `layers` (later ones win) over the defaults, with the method's own options as `strategy`.

    Raises:
        BadInput: unknown key, wrong type or out of range; one message with the key, the rule and what came.
    """
    schema = OmegaConf.structured(RunConfig)
    _unfreeze(schema)
    schema.strategy = OmegaConf.structured(strategy_type)
    _unfreeze(schema)
    config: DictConfig = schema
    for layer in layers:
        _check_keys(layer, RunConfig, strategy_type, "")
        try:
            config = cast(DictConfig, OmegaConf.merge(config, _plain(layer)))
        except OmegaConfBaseException as error:
            raise _refused(error) from error
        except TypeError as error:  # a mapping where a list belongs; OmegaConf does not say which
            raise BadInput(f"{', '.join(layer)}: {error}") from error
    try:
        return cast(RunConfig, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise _refused(error) from error


def _refused(error: OmegaConfBaseException) -> BadInput:
    return BadInput(f"{error.full_key or 'config'}: {str(error).splitlines()[0]}")


def from_dict(tree: Mapping[str, Any], strategy_type: type[StrategyConfig] = StrategyConfig) -> RunConfig:
    """The inverse of `to_dict`."""
    return build([tree], strategy_type)


def _plain(layer: Mapping[str, Any]) -> dict[str, Any]:
    """cohort_size may be written as a number; clip=off is the word, which YAML reads as false."""
    tree = {key: dict(value) if isinstance(value, Mapping) else value for key, value in layer.items()}
    federation = tree.get("federation")
    if not isinstance(federation, dict):
        return tree
    size = federation.get("cohort_size")
    if isinstance(size, int) and not isinstance(size, bool):
        federation["cohort_size"] = str(size)
    if federation.get("clip") is False:
        federation["clip"] = "off"
    return tree


def _unfreeze(node: DictConfig) -> None:
    """Frozen dataclasses become read-only nodes, which refuse a merge; the objects made at the end are frozen again."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        if isinstance(node[key], DictConfig):
            _unfreeze(node[key])


def _check_keys(tree: Mapping[str, Any], kind: type, strategy_type: type, prefix: str) -> None:
    """Unknown keys are refused with near matches, before OmegaConf refuses them without."""
    hints = get_type_hints(kind)
    for key, value in tree.items():
        if key not in hints:
            raise unknown(f"{prefix}{key}", str(key), hints)
        inner = strategy_type if key == "strategy" and not prefix else hints[key]
        if dataclasses.is_dataclass(inner):
            if not isinstance(value, Mapping):
                names = ", ".join(get_type_hints(inner))
                raise BadInput(f"{prefix}{key}: must be a mapping with keys among {names}, got {value!r}")
            _check_keys(value, cast(type, inner), strategy_type, f"{prefix}{key}.")
        elif value is None and not (isinstance(inner, types.UnionType) and type(None) in get_args(inner)):
            raise BadInput(f"{prefix}{key}: must not be null")
