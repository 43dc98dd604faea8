"""What can be known of a base model without loading its weights: where it lies, its tokenizer, its shapes."""

import importlib.util
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from fedstrata.core.adapters import Flat, Layout
from fedstrata.core.config import RunConfig
from fedstrata.core.errors import BadInput

if TYPE_CHECKING:
    from torch import nn


PROJECTOR = "multi_modal_projector"  # what transformers calls it in every LLaVA


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
        BadInput: the base's config is not on this machine, is no LLaVA's, or lacks one of lora.targets.
    """
    import torch
    import transformers

    settings = _config(config.model.name, "model.name")
    if settings.model_type != "llava":
        raise BadInput(f"model.name: {config.model.name!r} must be of model type 'llava', got {settings.model_type!r}")
    with torch.device("meta"):
        model: Any = transformers.LlavaForConditionalGeneration(settings)
    return find_layout(model, config.lora.targets, config.strategy.projector)


def find_layout(model: "nn.Module", targets: Sequence[str], projector: str = "frozen") -> Layout:
    """The language model's Linear layers whose name ends with one of `targets`, as PEFT matches a list.

    projector: shared: with the multimodal projector's parameters as the dense tail.

    Raises:
        BadInput: a target that matches no Linear layer of the language model.
    """
    from torch import nn

    modules, used = [], set()
    for name, module in model.named_modules():
        hit = next((target for target in targets if name == target or name.endswith(f".{target}")), None)
        if hit and "language_model" in name and isinstance(module, nn.Linear):
            modules.append((name, module.out_features, module.in_features))
            used.add(hit)
    if set(targets) - used:
        wrong = ", ".join(sorted(set(targets) - used))
        raise BadInput(f"lora.targets: {wrong}: no Linear layer of the language model has this name")
    dense = [(name, tuple(p.shape)) for name, p in model.named_parameters() if f".{PROJECTOR}." in f".{name}"]
    return Layout(tuple(sorted(modules)), tuple(dense) if projector == "shared" else ())


def dense_weights(name: str, layout: Layout) -> dict[str, Flat]:
    """The base's own values of the layout's tail, float32, from its weight files alone.

    Older folders name the model's parts without the leading `model.`, so parameters are found by what they end with.

    Raises:
        BadInput: the base's safetensors files are not on this machine or lack one of the parameters.
    """
    found: dict[str, Flat] = {}
    for path in _weight_files(name):
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


def _weight_files(name: str) -> list[Path]:
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
    """Length of an identity token. Raises `BadInput` when the encoder's settings are not on this machine."""
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
