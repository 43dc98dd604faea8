"""Side-by-side measurements: `fedstrata bench NAME` runs `bench()` of `benchmarks/<name>.py`."""

NAMES = {
    "e2e": "a whole round of 32 clients against stock Flower simulation",
    "cohort-tiny": "local training, hidden 64, against a PEFT loop, Trainer and pfl-research",
    "cohort-small": "local training, hidden 256, against a PEFT loop and pfl-research",
    "cohort-ops": "operations dispatched per client-step, against PEFT with foreach AdamW",
    "grid": "cost per client message, against stock Flower simulation",
    "overhead": "a round of fcit-mini against its own training compute",
    "ssa": "answering with 16 mixtures of 8 subspaces, against the published path and the bare base",
    "aggregate": "streaming mean of 100 adapters of 42 MB, against memcpy and Flower's aggregation",
    "bytes": "upload per client-round at LLaVA-1.5-7B's shapes, against the published code",
    "memory": "growth of memory with 4 workers on one base, against one copy of it",
    "scale": "10,000 registered clients against 100",
    "leak": "memory after 200 rounds against memory after 20",
    "token-dp": "identity tokens with noise: which tasks of fcit-mini keep their subspaces, at what epsilon",
    "attacks": "what hostile clients do to the merged adapter, by attack, rule and subspaces",
    "gpu": "what a GPU does at best: cost of an operation, matrix peak, memory per token",
    "gpu-train": "local training at LLaVA-1.5-7B's shape, against the published recipe on the same card",
    "gpu-round": "a round of 100 clients at TinyLlama-1.1B's shape",
    "gpu-small": "64 clients at hidden 256, against a PEFT loop on the same card",
    "gpu-ssa": "answering with 32 mixtures at LLaVA-1.5-7B's shape, against the bare base",
    "gpu-memory": "memory of 1, 4 and 16 concurrent clients at LLaVA-1.5-7B's shape",
}
