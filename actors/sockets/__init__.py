"""The sockets by which steps and hidden states pass from stage to stage."""
