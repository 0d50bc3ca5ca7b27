"""The release of galaxyline. pyproject.toml reads it from here: the code may run without being installed."""

VERSION = "0.1.0"
