"""What a stage computes: the model's modules, the KV cache, sampling and the messages of a step. No ray, no HTTP."""
