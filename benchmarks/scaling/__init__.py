"""How the throughput of a pipeline grows with its stages."""
