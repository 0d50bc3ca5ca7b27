"""Pipelines of many stages: the timed device, and what is measured on it."""
