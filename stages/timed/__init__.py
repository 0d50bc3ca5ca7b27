"""The timed device: stages that take the time of real ones without computing. Nothing here imports torch."""
