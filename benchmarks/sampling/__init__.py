"""Sampling beside compute: what drawing tokens takes of the thread that computes, and of a last stage's throughput."""
