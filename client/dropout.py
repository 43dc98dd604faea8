"""LoRA's dropout with a client dimension: a client's draws do not depend on who shares its forward pass."""

from collections.abc import Sequence

import torch

from fedstrata.core.seeds import derive


class Dropout:
    """On the input of A, as PEFT's lora_dropout: an entry stays with probability 1 − p and is then divided by it.

    Each row of each step has a generator of its own, which its layers draw from in the order they run, for its own
    tokens alone: neither other clients, nor padding, nor the cut into micro-batches change what it draws.
    """

    def __init__(self, probability: float, device: torch.device) -> None:
        self.probability, self.device = probability, device
        self._rows: list[tuple[int, torch.Generator] | None] = []
        self._drawn: dict[str, list[torch.Tensor]] = {}  # layer → what its rows' generators were before it drew

    def begin(
        self,
        lengths: Sequence[Sequence[int]],
        seeds: Sequence[int],
        step: int,
        places: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """The next forward pass holds these rows.

        Args:
            lengths: per client, the tokens of each of its rows; clients with fewer rows are padded to equally many.
            seeds: per client, its job's seed.
            step: number of the optimiser's step.
            places: per client, where its rows stand in its batch, which goes through piece by piece; None: all of it.
        """
        size, self._rows, self._drawn = max(map(len, lengths)), [], {}
        places = places or [range(len(mine)) for mine in lengths]
        for mine, own, seed in zip(lengths, places, seeds, strict=True):
            draws = [derive(seed, "dropout", step, place) for place in own]
            rows = zip(mine, (torch.Generator(self.device).manual_seed(draw) for draw in draws), strict=True)
            self._rows += [*rows, *[None] * (size - len(mine))]

    def __call__(self, x: torch.Tensor, layer: str = "") -> torch.Tensor:
        """x [rows, L, in], zero where nothing was drawn: rows and tokens that are only padding.

        layer: its name, if any; a named one that runs again for its gradient draws what it drew.
        """
        keep, draws = torch.zeros_like(x), [row[1] for row in self._rows if row is not None]
        if layer not in self._drawn:
            self._drawn |= {layer: [draw.get_state() for draw in draws]} if layer else {}
        else:
            for draw, state in zip(draws, self._drawn[layer], strict=True):
                draw.set_state(state)
        for index, row in enumerate(self._rows):
            if row is not None:
                length, draw = row
                keep[index, :length] = (
                    torch.rand(length, x.shape[2], generator=draw, device=x.device) >= self.probability
                )
        return x * keep / (1 - self.probability)
