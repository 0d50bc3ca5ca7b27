"""How long a stage takes to load its weights, with and without the weight cache."""
