"""The engine's process: the scheduler, the pipeline and what is measured of both."""
