"""What the prefix cache and its tiers save: `python -m benchmarks.prefix`."""
