"""Runs inside a client's container: what that client's network lets it do. Prints {question: answer} as JSON."""

import http.client
import json
import os
import socket
import ssl

SAFE = ssl.create_default_context(cafile=f"{os.environ['FEDSTRATA_CERTS']}/ca.crt")


def ask(path: str, length: int = 0, plain: bool = False) -> int:
    """The status of a POST; length: of a body that is announced and never sent."""
    if plain:
        connection = http.client.HTTPConnection("gate", 8443, timeout=30)
    else:
        connection = http.client.HTTPSConnection("gate", 8443, timeout=30, context=SAFE)
    connection.request("POST", path, headers={"Content-Length": str(length)})
    return connection.getresponse().status


def reached(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), 3).close()
    except OSError:
        return False
    return True


print(
    json.dumps(
        {
            "fleet": ask("/v1/fleet/activate-node"),
            "start a run": ask("/v1/control/start-run"),
            "register a node": ask("/v1/control/register-node"),
            "around the path": ask("/v1/fleet/../control/list-runs"),
            "around it, hidden": ask("/v1/fleet/%2e%2e/control/list-runs"),
            "runtime": ask("/v1/runtime/pull-task-input"),
            "docs": ask("/docs"),
            "512 MB": ask("/v1/fleet/push-object", length=512 * 1024 * 1024),
            "plain HTTP": ask("/v1/fleet/activate-node", plain=True),
            "superlink": reached("superlink", 8000),
            "its address": reached(os.environ["SUPERLINK_IP"], 8000),
            "another client": reached("client-1", 22),
            "outside": reached("1.1.1.1", 443),
        }
    )
)
