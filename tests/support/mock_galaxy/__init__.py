"""Wormhole Galaxies without hardware: what the real ttnn package needs to open mock devices of them.

ttnn validates every op, allocates memory and routes its fabric for them, but no kernel runs: what is read from a mock
device is zeros.
"""
