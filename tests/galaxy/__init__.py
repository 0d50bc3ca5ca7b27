"""What only the real ttnn package can show, on mock Galaxies: `make test-ttnn` runs these in their own environment."""
