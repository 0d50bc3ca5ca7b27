"""Mock Wormhole Galaxies: everything that the real ttnn package needs to open devices without hardware.

ttnn validates every op, allocates memory and routes its fabric for them, but no kernel runs, and values read from a
mock device are zeros.
"""
