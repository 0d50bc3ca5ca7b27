"""Capacity planning without chips: the memory of each stage, whether it fits, and its predicted speed.

Nothing here imports torch or a device.
"""
