"""One stage's process: the actor, its threads, and what the engine calls in it."""
