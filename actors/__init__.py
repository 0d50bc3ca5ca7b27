"""Where stages run: the Ray cluster, placement, stage actors, the sockets between them and the pipeline."""
