"""The root of the project's errors, and those of reading and converting weights.

Every package adds its own in its `errors.py`; `api/errors.py` maps each class to an HTTP status and an exit code.
"""


class GalaxylineError(Exception):
    """Base of every error the project raises on purpose; its text is one sentence for the user of the command line.

    The text may name files, tensors and hosts. `public` is the sentence that clients of the server get in its stead:
    None where they are only told that the server failed.
    """

    def __init__(self, message: str = "", *, public: str | None = None) -> None:
        super().__init__(message)
        self.public = public


class PublicError(GalaxylineError):
    """An error whose text is fit for clients of the server: it is the public sentence, unless another one is given."""

    def __init__(self, message: str = "", *, public: str | None = None) -> None:
        super().__init__(message, public=message if public is None else public)


class CheckpointError(GalaxylineError):
    """A checkpoint that cannot be used; the sentence names the file, and the tensor where there is one."""


class CacheError(GalaxylineError):
    """The weight cache cannot be written or read; the sentence names the path."""
