"""The federation: its loop over stages and rounds, grids, checkpoints, report, command line, the Flower ServerApp."""

import os

# Ray, Flower and torch read these once, when they are imported; this room is imported before any of them.
for _key, _value in {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(_key, _value)
