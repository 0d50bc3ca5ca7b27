"""Whether anything is lost while stages are killed, stopped and cut off, and while their devices fail."""
