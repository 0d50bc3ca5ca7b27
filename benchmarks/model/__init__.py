"""Tokens a second and time to the first token, beside Hugging Face's `generate`."""
