"""What a model asks of chips before any is opened: the memory of each stage, whether it fits, and its predicted speed.

Nothing here imports torch or a device.
"""
