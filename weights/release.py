"""Which release of galaxyline this is. pyproject.toml reads it from here: the code may run without being installed."""

VERSION = "0.1.0"
