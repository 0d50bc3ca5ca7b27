"""Tests with the real ttnn package on mock Galaxies; `make test-ttnn` runs them in their own environment."""
