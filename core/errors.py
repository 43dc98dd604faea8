"""What can go wrong, and the exit code it ends with.

FedstrataError            1  the run failed
├── BadInput              2  something the user gave is wrong: names the file, key or client, the rule and what came
└── Interrupted          75  stopped from outside; `fedstrata resume` goes on from the last commit
"""

from collections.abc import Iterable
from difflib import get_close_matches


class FedstrataError(Exception):
    """A failure with one clear message; `exit_code` is what the command line ends with."""

    exit_code = 1


class BadInput(FedstrataError):
    """The user's input breaks a rule."""

    exit_code = 2


class Interrupted(FedstrataError):
    """The run was stopped and can be resumed."""

    exit_code = 75


def unknown(kind: str, name: str, known: Iterable[str]) -> BadInput:
    """A `BadInput` for a name that is not in the catalogue, with near matches.

    >>> str(unknown("strategy.name", "dsico", ["disco", "joint"]))
    "strategy.name: unknown 'dsico'; did you mean 'disco'? known: disco, joint"
    """
    choices = sorted(known)
    near = get_close_matches(name, choices, n=1)
    hint = f" did you mean '{near[0]}'?" if near else ""
    return BadInput(f"{kind}: unknown '{name}';{hint} known: {', '.join(choices)}")
