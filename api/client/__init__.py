"""The front end's side of engines: one engine, replicas, and the metrics of requests."""
