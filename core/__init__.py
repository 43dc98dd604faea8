"""The vocabulary that every other folder speaks: config, wire records, adapters, metrics, seeds, errors."""
