"""What only chips can show: `pytest -m galaxy tests/silicon` on a Galaxy, in the environment of `make test-ttnn`."""
