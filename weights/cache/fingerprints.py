"""Remembered fingerprints of checkpoints: computing one reads every byte, which takes minutes for R1."""

import re
from contextlib import suppress
from pathlib import Path

from weights.source import WeightSource

DIRECTORY = ".fingerprints"

_FINGERPRINT = re.compile(f"[0-9a-f]{{{2 * WeightSource.FINGERPRINT_BYTES}}}")


class Fingerprints:
    """Fingerprints by the inodes and times of a checkpoint's files, stored in a directory of the weight cache.

    A fingerprint is valid as long as no file is replaced or written to, which changes its inode or its times.
    """

    def __init__(self, cache_directory: Path) -> None:
        self._directory = cache_directory / DIRECTORY

    def of(self, source: WeightSource, *prefixes: str) -> str:
        """Returns `source.fingerprint(*prefixes)`, from the cache if possible. Raises CheckpointError as that does."""
        identity = source.identity(*prefixes)
        if identity is None:
            return source.fingerprint(*prefixes)
        remembered = self._directory / identity
        with suppress(OSError, UnicodeDecodeError):
            fingerprint = remembered.read_text(encoding="ascii")
            if _FINGERPRINT.fullmatch(fingerprint):
                return fingerprint
        fingerprint = source.fingerprint(*prefixes)
        # A fingerprint is not remembered if a file was written to while it was read.
        if source.identity(*prefixes) == identity:
            self._remember(remembered, fingerprint)
        return fingerprint

    def _remember(self, path: Path, fingerprint: str) -> None:
        # If this fails, as on a full disk or in a read-only cache, the bytes are read again next time, and also if a
        # kill leaves half a fingerprint, which does not match the pattern.
        with suppress(OSError):
            self._directory.mkdir(parents=True, exist_ok=True)
            path.write_text(fingerprint, encoding="ascii")
