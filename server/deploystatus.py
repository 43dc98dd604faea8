"""`fedstrata deploy status`: who is connected, where the run stands, when each client last took part, bytes."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedstrata.core.errors import BadInput
from fedstrata.server import deploynodes
from fedstrata.server.deployflower import Flower
from fedstrata.server.report import human_bytes
from fedstrata.server.runfolder import RunFolder


def status(flower: Flower, run_dir: Path | None) -> dict[str, Any]:
    """{nodes, runs, run} as values. run_dir: a run folder that this host sees; None: only what Flower knows."""
    nodes = [
        {
            "client": name,
            "node": str(node.node_id),
            "status": node.status,
            "online": node.last_activated_at,
            "offline": node.last_deactivated_at,
        }
        for name, node in deploynodes.named(flower.nodes(), flower.place)
    ]
    runs = [{key: run[key] for key in ("run-id", "status", "status-details", "elapsed")} for run in flower.runs()]
    return {"nodes": nodes, "runs": runs, "run": standing(run_dir) if run_dir else None}


def standing(run_dir: Path) -> dict[str, Any]:
    """Where a run stands: {folder, stage, round, bytes_up, bytes_down, seen, refused}.

    seen: client → when it last took part and in which round; refused: node → when it was last refused, and why.
    """
    events = RunFolder(run_dir).events()
    rounds = [event for event in events if event["event"] == "round"]
    refused = {
        event["node"]: {"time": event["time"], "reason": event["reason"]}
        for event in events
        if event["event"] == "node_refused"
    }
    seen = {
        f"client-{row['client']}": {"time": event["time"], "stage": event["stage"], "round": event["round"]}
        for event in rounds
        for row in event["participants"]
    }
    last = rounds[-1] if rounds else {"stage": 0, "round": 0}
    total = {key: sum(event[key] for event in rounds) for key in ("bytes_up", "bytes_down")}
    return {
        "folder": str(run_dir),
        "stage": last["stage"],
        "round": last["round"],
        **total,
        "seen": seen,
        "refused": refused,
    }


def show(told: dict[str, Any], console: Console) -> None:
    """The same as a table and two lines."""
    run = told["run"]
    table = Table("client", "node", "status", "since", "last round")
    for node in told["nodes"]:
        seen = run["seen"].get(node["client"]) if run else None
        last = f"stage {seen['stage']} round {seen['round']}, {seen['time']}" if seen else ""
        since = node["online"] if node["status"] == "online" else node["offline"]
        table.add_row(node["client"], node["node"], node["status"], since, last)
    console.print(table)
    for each in told["runs"]:
        details = f" {each['status-details']}" if each["status-details"] else ""
        console.print(f"Flower run {each['run-id']}: {each['status']}{details}", highlight=False, markup=False)
    if run:
        cost = f"{human_bytes(run['bytes_up'])} up, {human_bytes(run['bytes_down'])} down"
        where = f"stage {run['stage']} round {run['round']} committed"
        console.print(f"{run['folder']}: {where}, {cost}", highlight=False, markup=False, soft_wrap=True)
        for node, last in run["refused"].items():
            line = f"node {node} was refused, last {last['time']}: {last['reason']}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def newest(runs: Path) -> Path:
    """The run folder in `runs` that was written last. Raises `BadInput` when there is none."""
    folders = sorted(runs.glob("*/config.yaml"), key=lambda path: path.stat().st_mtime)
    if not folders:
        raise BadInput(f"{runs}: holds no run folder")
    return folders[-1].parent
