"""Side-by-side measurements: `fedstrata bench NAME` runs `benchmarks/<name>.py`."""
