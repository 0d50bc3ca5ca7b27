"""Benchmarks: ratios of two things measured in turn in one run, and processor time, which other load does not change.

`make bench` runs all of them; `python -m benchmarks.hop --help` and so on explain one. docs/benchmarks.md has results.
"""
