"""Pipelines of many stages: the timed device, and the benchmark of scaling on it."""
