"""Files of a model that are read whole, each within a bound."""

from pathlib import Path

from weights.errors import CheckpointError


def read_bounded(path: Path, bytes_max: int) -> bytes | None:
    """Reads a file; None where there is none. Raises CheckpointError where it is larger, or cannot be read."""
    try:
        with path.open("rb") as file:
            content = file.read(bytes_max + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error
    if len(content) > bytes_max:
        raise CheckpointError(f"{path} is larger than {bytes_max} bytes: it is not a file of this kind.")
    return content
