"""The timed device: stages that take the time of real ones and compute nothing. Nothing here imports torch."""
