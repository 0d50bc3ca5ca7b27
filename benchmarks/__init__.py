"""How fast the parts are: ratios of two things measured in turn in one run, and processor time, which does not wait.

`make bench` runs all of them; `python -m benchmarks.hop --help` and so on run one. docs/benchmarks.md explains them.
"""
