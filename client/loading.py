"""Opening a base model: the embedded one, a local folder or a hub name; a LLaVA or a language model alone."""

import ctypes
import gc
import importlib
import logging
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedstrata.core.config import ModelSection
from fedstrata.core.errors import BadInput
from fedstrata.core.shapes import PROJECTOR, TOWER, architecture

TINY = Path(__file__).parent / "tiny"
PACKED = "support_avx512bf16_for_cpu"  # of bitsandbytes: it would rewrite the weights when they first answer
KEPT = 256 << 20  # bytes
MALLOPT = {-3: 32 << 20, -1: KEPT}  # M_MMAP_THRESHOLD, of which 32 MB is the most; M_TRIM_THRESHOLD
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def open_base(section: ModelSection) -> tuple[Any, Any]:
    """(the model, frozen and on its device; its processor, or the tokenizer of a language model alone).

    Raises:
        BadInput: a base that cannot be loaded whole.
    """
    import transformers

    # typed loosely: transformers' own annotations of its factories do not hold under mypy strict
    loaders: Any = transformers
    loaders.utils.logging.disable_progress_bar()
    loaders.utils.logging.set_verbosity_error()  # what matters in its load report is checked below
    folder, device = find(section.name), find_device(section.device)
    options = {} if section.quantise == "none" else quantised(section.quantise, device)
    try:
        config = loaders.AutoConfig.from_pretrained(folder)
        model, report = architecture(config).from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, section.dtype),
            attn_implementation=section.attention,
            ignore_mismatched_sizes=True,  # so that the report names them
            output_loading_info=True,
            **options,
        )
        reader = loaders.AutoProcessor if config.model_type == "llava" else loaders.AutoTokenizer
        processor = reader.from_pretrained(folder)
    except Exception as error:  # a corrupt file surfaces as one of many types, all of them the user's to mend
        raise BadInput(f"model.name: cannot load {section.name!r}: {_first_line(error)}") from error
    _check_whole(section.name, report)
    model = model if options else model.to(device)
    for module in model.modules():
        if hasattr(module, PACKED):
            setattr(module, PACKED, False)
    return model.eval().requires_grad_(False), processor


def quantised(bits: str, device: torch.device) -> dict[str, Any]:
    """What makes transformers quantise the language model's Linear layers: 8-bit integers, or 4-bit NF4 as QLoRA does.

    No column of 8 bits is kept apart for its outliers: which ones are is decided over all rows of a batch, so that a
    client's result would depend on who shares its cohort.

    Raises:
        BadInput: bitsandbytes is not installed, or does not run on this device.
    """
    import transformers

    apart = [rf".*\.{PROJECTOR}", rf".*\.{TOWER}", "lm_head"]  # small, or read by other means than a forward pass
    try:
        functional = importlib.import_module("bitsandbytes.functional")
        functional.quantize_4bit(torch.ones(64, 64, device=device), quant_type="nf4")
    except Exception as error:  # an import that finds no library, or one of many a backend raises
        raise BadInput(
            f"model.quantise: {bits!r} needs bitsandbytes, with a backend for {device.type}: pip install"
            f" 'fedstrata[gpu]' ({_first_line(error)})"
        ) from error
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # remarks on each layer's own types
    if bits == "8bit":
        settings: dict[str, Any] = {"load_in_8bit": True, "llm_int8_threshold": 0.0}
    else:
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        settings |= {"bnb_4bit_compute_dtype": torch.bfloat16}
    loaders: Any = transformers
    config = loaders.BitsAndBytesConfig(**settings, llm_int8_skip_modules=apart)
    return {"quantization_config": config, "device_map": {"": device}}


def find(name: str) -> str:
    """The embedded base's folder, a folder, or a hub name as it is; anything else never reaches the network."""
    if name == "tiny":
        return str(TINY)
    if not Path(name).is_dir() and not HUB_NAME.fullmatch(name):
        raise BadInput(f"model.name: must be 'tiny', a folder or a hub name (owner/name), got {name!r}")
    return name


def find_device(name: str) -> torch.device:
    """What `model.device` stands for on this machine."""
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("model.device: 'cuda' was asked for, but torch finds no GPU here")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@torch.no_grad()
def check_language_model(name: str, model: Any, backbone: Any, layers: Mapping[str, nn.Module]) -> None:
    """Backbone and head must give the model's own logits, no token may see the next one, adapted layers see rows.

    Some models do more between backbone and head than training repeats (a cap on the logits, a scale); some hand the
    tokens of all rows to a layer in one heap, where nobody can tell whose they are.

    Raises:
        BadInput: a language model of which one of these does not hold.
    """
    ids, seen = torch.tensor([[0, 1], [0, 2]], device=model.device), set()
    watches = [
        layer.register_forward_hook(lambda _, args, out, key=key: seen.add((key, tuple(args[0].shape[:-1]))))
        for key, layer in layers.items()
    ]
    hidden = backbone(inputs_embeds=model.get_input_embeddings()(ids), use_cache=False).last_hidden_state
    for watch in watches:
        watch.remove()
    ours = model.get_output_embeddings()(hidden).float()
    theirs = model(input_ids=ids, use_cache=False).logits.float()
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max())):
        raise BadInput(f"model.name: {name!r} does more than one Linear layer between its hidden states and its logits")
    if not torch.allclose(ours[0, 0], ours[1, 0], rtol=1e-3, atol=1e-3 * float(ours.abs().max())):
        raise BadInput(f"model.name: {name!r} is no causal language model: a token sees the next one")
    if wrong := {(key, tuple(ids.shape)) for key in layers} ^ seen:
        raise BadInput(f"lora.targets: {min(wrong)[0]}: is not given whole rows of the batch, so it cannot be adapted")


def give_back() -> None:
    """What loading took beside the base: the GNU allocator would keep it, in every worker of a machine."""
    gc.collect()
    _allocator("malloc_trim", 0)


def keep_freed() -> None:
    """From now on the GNU allocator keeps what training frees, up to `KEPT`, for the next step's tensors.

    It would hand every larger one back to the system, which fills a new one with zeros page by page: 7 % of a step at
    hidden 64, 15 % at hidden 256.
    """
    for rule, size in MALLOPT.items():
        _allocator("mallopt", rule, size)


def _allocator(name: str, *arguments: int) -> None:
    """Calls a function of the GNU C library; others have none of that name."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)


def _check_whole(name: str, report: Any) -> None:
    """transformers fills weights that are missing or of another shape with random numbers and only remarks on it."""
    names = [*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])]
    if names:
        fault = f"weights are missing or of another shape than its config says ({len(names)})"
        raise BadInput(f"model.name: cannot load {name!r}: {fault}: {', '.join(sorted(names)[:3])}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
