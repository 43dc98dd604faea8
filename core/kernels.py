"""How float32 matrices are multiplied on a CPU: torch's default (MKL), or oneDNN.

On some chips (AMD's) oneDNN is up to twice as fast and just as exact; on others the same switch of torch's rounds to
bfloat16. So it is taken only where a probe of its error passes, and only for a base that is wide enough to gain: which
way a run goes depends on machine and config alone, never on timing, and is written into its config at the start.
"""

from dataclasses import replace
from functools import lru_cache

from fedstrata.core.config import ModelSection, RunConfig
from fedstrata.core.errors import BadInput
from fedstrata.core.shapes import folder_of

WIDE = 192  # hidden size from which oneDNN gains: measured at 64 (loses), 96 (even), 192 and 256 (gains)
MOST = 1e-5  # largest ‖difference‖ / ‖product‖ to float64; float32 has 3e-7, bfloat16 4e-3
PRECISION = {"default": "highest", "onednn": "medium"}


def settled(config: RunConfig) -> RunConfig:
    """The config with `model.matmul=auto` replaced by what it stands for.

    Clients on machines of their own (Flower's grid, an existing Ray cluster) are not probed from here: `default`.
    """
    if config.model.matmul != "auto":
        return config
    here = config.federation.grid != "flower" and not config.federation.ray_address
    fits = here and config.model.dtype == "float32" and _hidden(config.model.name) >= WIDE and _on_cpu(config.model)
    choice = "onednn" if fits and error() <= MOST else "default"
    return replace(config, model=replace(config.model, matmul=choice))


def use(model: ModelSection) -> None:
    """Makes this process multiply as the config says; `auto`, which no run's clients are sent, as `default`.

    Raises:
        BadInput: oneDNN is asked for where it is not exact.
    """
    import torch

    onednn = model.matmul == "onednn" and _on_cpu(model)
    if onednn and error() > MOST:
        rule = f"onednn must multiply float32 with a relative error of at most {MOST:g} on every machine of the run"
        raise BadInput(f"model.matmul: {rule}, got {error():.1e}; model.matmul=default is exact everywhere")
    torch.set_float32_matmul_precision(PRECISION["onednn" if onednn else "default"])


@lru_cache(maxsize=1)
def error() -> float:
    """‖AB − AB in float64‖ / ‖AB‖ through oneDNN on this machine, the larger one of a plain and a batched product."""
    import torch

    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(4, 256, 256, generator=draw) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(PRECISION["onednn"])
    try:
        came = [left[0] @ right[0], torch.bmm(left, right)]
    finally:
        torch.set_float32_matmul_precision(before)
    exact = left.double() @ right.double()
    pairs = zip(came, (exact[0], exact), strict=True)
    return max(float((product - wanted).norm() / wanted.norm()) for product, wanted in pairs)


def _on_cpu(model: ModelSection) -> bool:
    import torch

    return model.device == "cpu" or not torch.cuda.is_available()


def _hidden(name: str) -> int:
    """The language model's hidden size; 0 while the base's config is not on this machine."""
    from transformers import AutoConfig

    try:
        settings = AutoConfig.from_pretrained(folder_of(name), local_files_only=True)
    except (OSError, ValueError):
        return 0
    return int(settings.get_text_config().hidden_size)
