"""Fingerprints of checkpoints that are remembered: taking one reads every byte, which takes minutes for R1."""

import re
from contextlib import suppress
from pathlib import Path

from weights.source import WeightSource

DIRECTORY = ".fingerprints"

_FINGERPRINT = re.compile(f"[0-9a-f]{{{2 * WeightSource.FINGERPRINT_BYTES}}}")


class Fingerprints:
    """Fingerprints by what the file system says of a checkpoint's files, kept in a directory of the weight cache.

    They hold for as long as no file was replaced or written to: any of that changes its inode or its times.
    """

    def __init__(self, cache_directory: Path) -> None:
        self._directory = cache_directory / DIRECTORY

    def of(self, source: WeightSource, *prefixes: str) -> str:
        """`source.fingerprint(*prefixes)`, from memory if it can be. Raises CheckpointError as that does."""
        identity = source.identity(*prefixes)
        if identity is None:
            return source.fingerprint(*prefixes)
        remembered = self._directory / identity
        with suppress(OSError, UnicodeDecodeError):
            fingerprint = remembered.read_text(encoding="ascii")
            if _FINGERPRINT.fullmatch(fingerprint):
                return fingerprint
        fingerprint = source.fingerprint(*prefixes)
        # A file that was written to while it was read would be remembered for what it no longer is.
        if source.identity(*prefixes) == identity:
            self._remember(remembered, fingerprint)
        return fingerprint

    def _remember(self, path: Path, fingerprint: str) -> None:
        # Where this fails, as on a full disk or in a cache that may only be read, the bytes are read again next time;
        # so they are where a kill leaves half of it, which is no fingerprint.
        with suppress(OSError):
            self._directory.mkdir(parents=True, exist_ok=True)
            path.write_text(fingerprint, encoding="ascii")
