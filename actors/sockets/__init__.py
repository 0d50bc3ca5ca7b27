"""How steps and hidden states get from stage to stage."""
