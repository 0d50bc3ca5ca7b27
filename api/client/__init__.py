"""The front end's side of the engines: one engine, its replicas, and the metrics of requests."""
