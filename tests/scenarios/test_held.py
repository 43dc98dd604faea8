"""Data that clients hold: the files of docs/scenarios.md, and metrics that no client can score alone."""

import json
import re
from pathlib import Path

import pytest

from fedstrata.core.config import ScenarioSection
from fedstrata.core.errors import BadInput
from fedstrata.core.scoring import SCORERS
from fedstrata.scenarios import build
from fedstrata.scenarios.held import HeldScenario
from fedstrata.scenarios.own import FILE, open_own

PAGE = Path(__file__).parents[2] / "docs" / "scenarios.md"


def test_both_files_on_the_page_are_what_a_server_and_a_client_read(tmp_path: Path) -> None:
    section = PAGE.read_text().split("## Data that clients hold")[1].split("\n## ")[0]
    server, client = re.findall(r"```yaml\n(.*?)```", section, flags=re.DOTALL)
    (tmp_path / "server.yaml").write_text(server)
    (tmp_path / FILE).write_text(client)
    (tmp_path / "plants" / "images").mkdir(parents=True)
    for split, rows in (("train", 20), ("test", 3)):
        told = [{"instruction": f"{split} {row}", "input": "", "output": "fern"} for row in range(rows)]
        (tmp_path / "plants" / f"{split}.json").write_text(json.dumps(told))
    text = (tmp_path / FILE).read_text()
    (tmp_path / FILE).write_text(text.replace("images: plants/images", "images: plants/images, format: alpaca"))
    scenario = build(ScenarioSection(str(tmp_path / "server.yaml")), 3, 0, 5)
    assert isinstance(scenario, HeldScenario)
    names = [task.name for task in scenario.tasks]
    assert (names, scenario.stages) == (["plants", "signs"], ((0,), (1,)))
    own = open_own(tmp_path, names, 1, 3, 0, 5)
    assert [own.timeline.tasks(1, stage, 1) for stage in (1, 2)] == [(0,), ()]
    assert own.share_size([0], 1, 1, 1) == 18  # a tenth is held out
    assert [len(task.test) for task in own.tasks] == [3, 0]


@pytest.mark.parametrize("metric", [name for name, scorer in SCORERS.items() if scorer.needs_corpus])
@pytest.mark.parametrize("key", ["metric: {}", "beside: [{}]"])
def test_a_metric_over_all_references_is_refused_where_clients_hold_them(tmp_path: Path, metric: str, key: str) -> None:
    path = tmp_path / "scenario.yaml"
    path.write_text(f"tasks: {{a: {{held: clients, {key.format(metric)}}}}}\nstages: [[a]]\n")
    rule = f"tasks.a.metric: must be one that adds up over clients: .*, got '{metric}'"
    with pytest.raises(BadInput, match=rule):
        build(ScenarioSection(str(path)), 3, 0)
