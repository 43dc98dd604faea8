"""DISCO's subspace selective activation (SSA): which subspaces answer an input, and how much.

Guo et al., "Federated Continual Instruction Tuning", ICCV 2025, arXiv 2503.12897; the kinds are its ablation.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedstrata.core.identity import cosines
from fedstrata.strategies.base import Inputs, Weights

ACTIVATIONS = ("softmax", "argmax", "cosine", "concat")


@dataclass(frozen=True)
class SelectiveActivation:
    """SSA: the router over the subspaces' tokens [K, D]."""

    tokens: npt.NDArray[np.float32]
    epsilon: float
    activation: str
    needs_features: bool = True

    def weights(self, inputs: Inputs) -> Weights:
        if not len(self.tokens):
            return np.zeros((len(inputs.ids), 0), dtype=np.float32)
        assert inputs.features is not None, "a router that needs features was given none"
        return activate(inputs.features, self.tokens, self.epsilon, self.activation)


def activate(
    features: npt.NDArray[np.float32], tokens: npt.NDArray[np.float32], epsilon: float, kind: str = "softmax"
) -> Weights:
    """α [B, K] for features [B, D] over the filled subspaces' tokens [K, D].

    softmax: α_i = exp(cos_i/ε) / Σ_j exp(cos_j/ε) (the paper); argmax: the best alone; cosine: cos_i itself;
    concat: every subspace at weight 1.
    """
    similar = cosines(features, tokens)
    if kind == "softmax":
        raised = np.exp((similar - similar.max(axis=1, keepdims=True)) / epsilon)
        weights = raised / raised.sum(axis=1, keepdims=True)
    elif kind == "argmax":
        weights = np.eye(len(tokens))[similar.argmax(axis=1)]
    else:
        weights = similar if kind == "cosine" else np.ones_like(similar)
    return np.asarray(weights, dtype=np.float32)
