"""How long hidden states take from one stage to the next."""
