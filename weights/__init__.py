"""Bytes: checkpoints, dequantisation, random weights, the cache and the sample model. No device, no mesh."""
