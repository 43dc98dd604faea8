"""What the tables say of a method, and what the laws of `tests/strategies/test_laws.py` hold it to."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Facts:
    """Every method of the catalogue declares its own in its class; what can be computed is not declared.

    Attributes:
        paper: arXiv number; empty without a paper.
        venue: where it was published.
        rehearsal: whether clients keep examples of earlier tasks.
        encoder: whether clients choose by features of a text encoder, though no token of theirs is asked for.
        grows: adapters that one more task adds to the state; each brings a token if the method asks for tokens.
        plain: options of `finetune` that the method repeats bit for bit with its `neutral` options; None: nothing in
            the catalogue is plainer.
        neutral: the method's own options at which it does so: its strength at zero.
        one_stage: it does so within the first stage alone, where there is nothing to keep or to merge yet.
        splits: the same data on two clients in the place of one give the same result.
    """

    paper: str = ""
    venue: str = ""
    rehearsal: bool = False
    encoder: bool = False
    grows: int = 0
    plain: Mapping[str, object] | None = None
    neutral: Mapping[str, object] = field(default_factory=dict)
    one_stage: bool = False
    splits: bool = True
