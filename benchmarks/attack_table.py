"""docs/attacks.md: `python benchmarks/attack_table.py docs/benchmarks/attacks.json > docs/attacks.md`."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HEAD = """# Hostile clients

What a fifth of hostile clients does to the merged adapter, by attack, rule and subspaces. `fedstrata bench attacks
--json docs/benchmarks/attacks.json` measures it, `python benchmarks/attack_table.py docs/benchmarks/attacks.json >
docs/attacks.md` writes this page; `docs/privacy.md` says what to make of it.

Replies are real messages that pass the real gate and DISCO's own merge; the updates in them are planted (Gaussian in
the factors), no model is trained. The hostile know all honest updates. A figure is the distance of the merged step to
the mean step of the honest clients, in lengths of the latter, both as what the adapter does (B A): 0 is perfect, 1 is
as bad as no step, ∞ is a lost model. *Spread* is the root mean square distance of one honest client's step to that
mean: what honest clients differ by. `suspects` is what is really there. Means over three seeds (the JSON
has the worst, too). Bold: above twice the spread.
"""


def page(result: Mapping[str, Any]) -> str:
    """One table per case: attacks down, rules across."""
    rows = result["pairs"]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    return "\n".join([HEAD, *(table(case, [row for row in rows if row["case"] == case]) for case in cases)])


def table(case: str, rows: list[Mapping[str, Any]]) -> str:
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    attacks = list(dict.fromkeys(row["attack"] for row in rows))
    at = {(row["attack"], row["rule"]): row for row in rows}
    lines = [f"## {case[0].upper()}{case[1:]}", "", f"| attack | spread | {' | '.join(rules)} |"]
    lines.append("|---|" + "--:|" * (len(rules) + 1))
    for attack in attacks:
        spread = at[attack, rules[-1]]["spread"]
        lines.append(f"| {attack} | {spread:.2f} | {' | '.join(cell(at[attack, rule]) for rule in rules)} |")
    return "\n".join([*lines, ""])


def cell(row: Mapping[str, Any]) -> str:
    if row["error"] is None:
        return "**∞**"
    text = f"{row['error']:.2f}" if row["error"] < 100 else f"{row['error']:.0e}"
    return f"**{text}**" if row["error"] > 2 * row["spread"] else text


if __name__ == "__main__":
    print(page(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")
