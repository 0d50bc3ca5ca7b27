"""The root of the project's errors, and those of reading and converting weights.

Every package adds its own in its `errors.py`; `api/errors.py` maps each class to an HTTP status and an exit code.
"""


class GalaxylineError(Exception):
    """Base of every error the project raises on purpose; its text is one sentence fit to show a user."""


class CheckpointError(GalaxylineError):
    """A checkpoint that cannot be used; the sentence names the file, and the tensor where there is one."""


class CacheError(GalaxylineError):
    """The weight cache cannot be written or read; the sentence names the path."""
