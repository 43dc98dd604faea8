"""PEFT's side of an adapter: its config, and the folder that `peft.PeftModel.from_pretrained` loads."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open

from fedstrata.core.adapters import LORA_A, LORA_B, MAGNITUDE, SCALE, Flat, Layout, feedforward
from fedstrata.core.errors import BadInput
from fedstrata.core.shapes import dense_weights, weight_files

if TYPE_CHECKING:
    from peft import PeftConfig

WRAPPERS = {"model", "vision_model"}  # parts of a name that older weight files have elsewhere, or not at all


def peft_config(layout: Layout, rank: int, scaling: float, rslora: bool = False) -> "PeftConfig":
    """What `peft.get_peft_model` builds this layout's low-rank factors and vectors from; the tail is not in it.

    scaling: γ in ΔW = γ B A; PEFT writes it as lora_alpha / r, or with use_rslora as lora_alpha / √r.

    Raises:
        BadInput: a kind that is a method's own.
    """
    from peft import IA3Config, LoraConfig

    if layout.own:
        raise BadInput(f"adapters of kind {layout.kind} have parts that PEFT's format does not hold")
    targets = [name for name, _, _ in layout.modules]
    if layout.kind == "ia3":
        return IA3Config(target_modules=targets, feedforward_modules=[name for name in targets if feedforward(name)])
    alpha: Any = scaling * (math.sqrt(rank) if rslora else rank)  # PEFT's annotation knows whole numbers only
    return LoraConfig(
        r=rank, lora_alpha=alpha, use_rslora=rslora, use_dora=layout.kind == "dora", target_modules=targets
    )


def save_peft(
    folder: Path,
    layout: Layout,
    flat: Flat,
    scaling: float,
    base: str,
    own: Mapping[str, Flat] | None = None,
    rslora: bool = False,
) -> None:
    """Writes one adapter as a folder that `peft.PeftModel.from_pretrained(base_model, folder)` loads.

    own: the base's values of what the adapter holds as differences (`own_values`): PEFT keeps what they come to, and
        whole modules of the tail.
    """
    import torch
    from safetensors.torch import save_file

    config = peft_config(layout, layout.rank(flat), scaling, rslora)
    config.base_model_name_or_path = base
    config.modules_to_save = sorted({name.rsplit(".", 2)[0] for name, _ in layout.dense}) or None  # type: ignore[attr-defined]
    config.save_pretrained(str(folder))
    tensors = {}
    for name, part in layout.views(flat).items():
        whole = (own or {})[name] + part if name in differences(layout) else part.copy()
        key = f"{name}.weight" if name.endswith((LORA_A, LORA_B)) else name
        tensors[f"base_model.model.{key}"] = torch.from_numpy(whole)
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})


def differences(layout: Layout) -> set[str]:
    """The parameters of which the wire carries the difference to the base's value."""
    return {name for name, _ in (*layout.vectors, *layout.dense)}


def own_values(name: str, dtype: str, layout: Layout) -> dict[str, Flat]:
    """The base's values of everything in `differences`, float32, from its weight files alone.

    A magnitude is the norm of a row of W as the base is loaded, in `dtype`; a scale is 1.

    Raises:
        BadInput: the base's safetensors files are not on this machine or lack one of the weights.
    """
    scales = {part: np.ones(shape, np.float32) for part, shape in layout.vectors if part.endswith(SCALE)}
    owners = [part.removesuffix(f".{MAGNITUDE}") for part, _ in layout.vectors if part.endswith(MAGNITUDE)]
    norms = {f"{owner}.{MAGNITUDE}": norm for owner, norm in _row_norms(name, dtype, owners).items()}
    return scales | norms | (dense_weights(name, layout) if layout.dense else {})


def _row_norms(name: str, dtype: str, layers: list[str]) -> dict[str, Flat]:
    """{layer: [out]}; files and models may differ in the wrappers around a layer's name, and in nothing else."""
    import torch

    wanted, found = {_bare(f"{layer}.weight"): layer for layer in layers}, {}
    for path in weight_files(name) if layers else []:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                layer = wanted.get(_bare(key))
                if layer is not None:
                    weight = file.get_tensor(key).to(getattr(torch, dtype)).float()
                    found[layer] = torch.linalg.vector_norm(weight, dim=1).numpy()
    missing = sorted(set(layers) - set(found))
    if missing:
        raise BadInput(f"model.name: the safetensors files of {name!r} hold no weights of {', '.join(missing[:3])}")
    return found


def _bare(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split(".") if part not in WRAPPERS)
