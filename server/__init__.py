"""The federation: its loop over stages and rounds, grids, checkpoints, report, command line, the Flower ServerApp."""

import os
import secrets
import sys

# Ray, Flower and torch read these once, when they are imported; this room is imported before any of them.
for _key, _value in {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(_key, _value)

# A Ray that we start answers nobody without the token; one that was imported before has read its mode already.
if "ray" not in sys.modules:
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
