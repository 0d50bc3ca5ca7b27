"""Tests that need chips: `pytest -m galaxy tests/silicon` on a Galaxy, in the environment of `make test-ttnn`."""
