"""Real clients against a server of the sample model."""
