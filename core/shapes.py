"""What can be known of a base model without loading its weights: where it lies, its tokenizer, its shapes."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from fedstrata.core.adapters import FUSED, Flat, Layout
from fedstrata.core.config import RunConfig
from fedstrata.core.errors import BadInput
from fedstrata.core.privacy import token_options

if TYPE_CHECKING:
    from torch import nn


PROJECTOR = "multi_modal_projector"  # what transformers calls them in every LLaVA
TOWER = "vision_tower"
TOWERS = ("clip_vision_model", "siglip_vision_model")  # those that keep a picture in a row of its own
LANGUAGE = "model.language_model"


def embedded() -> Path:
    """The folder of the embedded base, which ships with the client."""
    found = importlib.util.find_spec("fedstrata.client")
    if found is None or not found.submodule_search_locations:
        raise BadInput("model.name: 'tiny' ships with fedstrata.client, which is not installed here")
    return Path(next(iter(found.submodule_search_locations))) / "tiny"


def folder_of(name: str) -> str:
    """The embedded base's folder for `tiny`; a folder or a hub name as it is."""
    return str(embedded()) if name == "tiny" else name


@lru_cache(maxsize=2)
def tokenizer(name: str) -> Any:
    """The base's tokenizer, or None where it is neither a folder nor cached on this machine; never downloads."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder_of(name), local_files_only=True)
    except (OSError, ValueError):
        return None


def layout(config: RunConfig) -> Layout:
    """The adapted layers of the run's base, from its config file alone: the model is built without memory.

    Raises:
        BadInput: the base's config is not on this machine, is of a type that cannot be a base, or lacks one of
            lora.targets.
    """
    import torch

    settings = _config(config.model.name, "model.name")
    try:
        factory = architecture(settings)
    except ValueError as error:
        raise BadInput(f"model.name: {config.model.name!r}: {error}") from None
    with torch.device("meta"):
        model: Any = factory.from_config(settings)
    found = find_layout(model, config.lora.targets, config.strategy.projector, config.lora.kind)
    return config.strategy.trains(found, settings.get_text_config().hidden_size, lambda: token_dim(config))


def architecture(settings: Any) -> Any:
    """What opens a base of these settings: transformers' factory of LLaVAs, or of causal language models.

    Raises:
        ValueError: any other model. An encoder would open as a language model that sees what it should predict, and
            weights of another model as one with random numbers.
    """
    import transformers

    if settings.model_type == "llava":
        return transformers.AutoModelForImageTextToText
    kind, known = type(settings), transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    encoders = (transformers.MODEL_FOR_MASKED_LM_MAPPING, transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
    encodes = getattr(settings, "is_decoder", True) is False and any(kind in mapping for mapping in encoders)
    if kind not in known or encodes or hasattr(settings, "vision_config"):
        rule = "it must be a causal language model without vision or of model type 'llava'"
        raise ValueError(f"{rule}, got {settings.model_type!r}")
    return transformers.AutoModelForCausalLM


def language_model(model: "nn.Module") -> str:
    """The name of the part that is the language model without its head."""
    names = {name for name, _ in model.named_modules()}
    return LANGUAGE if LANGUAGE in names else str(model.base_model_prefix)


def find_layout(model: "nn.Module", targets: Sequence[str], projector: str = "frozen", kind: str = "lora") -> Layout:
    """The Linear layers that `targets` name.

    An entry stands for every Linear layer of the language model whose name ends with it, as PEFT matches a list. One
    that ends no such name, but is a whole name or the end of one with a dot in it, stands for layers anywhere else:
    multi_modal_projector.linear_1, vision_tower.encoder.layers.0.self_attn.q_proj.

    projector: shared, per-subspace: with the multimodal projector's parameters as the dense tail.
    kind: lora.kind.

    Raises:
        BadInput: a target that matches no Linear layer or one that cannot be adapted, or a shared projector that is
            adapted too or not there.
    """
    from torch import nn

    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    inside = f"{language_model(model)}."
    chosen = {name for target in targets for name in _named(linear, target, inside)}
    _check_rows(model, [name for name in chosen if not name.startswith(inside)])
    dense = [(name, tuple(p.shape)) for name, p in model.named_parameters() if f".{PROJECTOR}." in f".{name}"]
    if projector != "frozen" and not dense:
        raise BadInput(f"strategy.projector: {projector!r} needs a base with a multimodal projector, this one has none")
    both = [name for name in chosen if f".{PROJECTOR}." in f".{name}"] if projector != "frozen" else []
    if both:
        raise BadInput(f"lora.targets: {min(both)}: strategy.projector={projector} trains this layer whole")
    modules = [(name, linear[name].out_features, linear[name].in_features) for name in sorted(chosen)]
    return Layout(tuple(modules), tuple(dense) if projector != "frozen" else (), "lora" if kind in FUSED else kind)


def _named(linear: "Mapping[str, nn.Linear]", target: str, inside: str) -> list[str]:
    """The names that `target` stands for; `inside` begins those of the language model's layers."""
    found = [name for name in linear if f".{name}".endswith(f".{target}")]
    own = [name for name in found if name.startswith(inside)]
    if not own and ("." in target or target in found):
        own = found
    if not own:
        hint = f"; elsewhere there is {found[0]}" if found else ""
        raise BadInput(f"lora.targets: {target}: no Linear layer of the language model has this name{hint}")
    return own


def _check_rows(model: Any, outside: Sequence[str]) -> None:
    """Clients that are trained together own rows of a batch, so a layer must be given whole rows."""
    for name in sorted(outside):
        if f".{TOWER}." in name and model.config.vision_config.model_type not in TOWERS:
            raise BadInput(f"lora.targets: {name}: a vision tower must be one of {', '.join(TOWERS)} to be adapted")
        if f".{TOWER}." not in name and f".{PROJECTOR}." not in name:
            raise BadInput(f"lora.targets: {name}: only the language model, the projector and the tower can be adapted")


def dense_weights(name: str, layout: Layout) -> dict[str, Flat]:
    """The base's own values of the layout's tail, float32, from its weight files alone.

    Older folders name the model's parts without the leading `model.`, so parameters are found by what they end with.

    Raises:
        BadInput: the base's safetensors files are not on this machine or lack one of the parameters.
    """
    found: dict[str, Flat] = {}
    for path in weight_files(name):
        with safe_open(path, framework="pt") as file:
            for wanted, _ in layout.dense:
                end = wanted[wanted.index(PROJECTOR) :]
                key = next((key for key in file.keys() if f".{key}".endswith(f".{end}")), None)  # noqa: SIM118
                if key is not None:
                    found[wanted] = file.get_tensor(key).float().numpy()
    missing = [wanted for wanted, _ in layout.dense if wanted not in found]
    if missing:
        raise BadInput(f"model.name: the safetensors files of {name!r} hold no {', '.join(missing)}")
    return found


def weight_files(name: str) -> list[Path]:
    """The safetensors files of a folder, or of a hub name's cached copy."""
    from transformers.utils.hub import cached_file

    for file in ("config.json", "model.safetensors", "model.safetensors.index.json"):
        try:
            path = cached_file(folder_of(name), file, local_files_only=True)
        except OSError:
            continue
        if path is not None and (files := sorted(Path(path).parent.glob("*.safetensors"))):
            return [file for file in files if file.name.startswith("model")]
    raise BadInput(f"model.name: {name!r} has no safetensors files on this machine")


def token_dim(config: RunConfig) -> int:
    """Length of an identity token, by `strategy.token`.

    Raises:
        BadInput: the base's or the encoder's settings are not on this machine.
    """
    kind = token_options(config.strategy).token
    return (0 if kind == "image" else _text_dim(config)) + (0 if kind == "text" else _sight_dim(config))


def _sight_dim(config: RunConfig) -> int:
    """Of a picture's feature, with the number that says that there is none (`client.identity.Sight`)."""
    settings = _config(config.model.name, "model.name")
    if not hasattr(settings, "vision_config"):
        raise BadInput(f"strategy.token: needs a base that sees pictures, {config.model.name!r} does not")
    layers = settings.vision_feature_layer
    return int(settings.vision_config.hidden_size) * (len(layers) if isinstance(layers, list | tuple) else 1) + 1


def _text_dim(config: RunConfig) -> int:
    name = config.model.text_encoder
    if name != "base":
        settings = _config(name, "model.text_encoder")
        return int(getattr(settings, "text_config", settings).hidden_size)
    path = Path(folder_of(config.model.name)) / "text_encoder.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["dim"])
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(f"model.text_encoder: 'base' needs {path}") from None


def _config(name: str, key: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder_of(name), local_files_only=True)
    except (OSError, ValueError):
        raise BadInput(f"{key}: the config of {name!r} is not on this machine") from None
