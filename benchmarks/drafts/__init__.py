"""What drafts give, and what they cost where they do not pay: `python -m benchmarks.drafts`."""
