"""Results of prompts as they end, a line each: a demo that was killed goes on with the prompts that are left."""

import fcntl
import os
from pathlib import Path
from typing import IO

import msgspec

from api.errors import OptionError

_ENCODER = msgspec.json.Encoder()


class LoggedResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line: `index` is the prompt's place in the run, from 1; `tokens` are the completion's.

    `settings` tells what else the completion depends on: the model, the weights and how tokens are chosen.
    """

    index: int
    prompt: str
    settings: str
    tokens: list[int]
    text: str


class ResultsLog:
    """A file that grows by whole lines, each on the disk before its prompt counts as done.

    One process writes to it at a time. What a line cut off by a kill had begun to say is dropped.
    """

    def __init__(self, path: Path) -> None:
        """Raises OptionError where the file cannot be opened, holds something else, or is in use."""
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = path.open("a+b")
        except OSError as error:
            raise OptionError(f"Cannot write to --checkpoint-jsonl '{path}': {error.strerror}.") from error
        try:
            self.results = self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "ResultsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def done(self, settings: str) -> dict[tuple[int, str], LoggedResult]:
        """The results with these settings by place and prompt."""
        return {(result.index, result.prompt): result for result in self.results if result.settings == settings}

    def add(self, result: LoggedResult) -> None:
        """Appends a result and waits until it is on the disk. Raises OptionError where it cannot be written."""
        try:
            self._file.write(_ENCODER.encode(result) + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OptionError(f"Cannot write to --checkpoint-jsonl '{self._path}': {error.strerror}.") from error
        self.results.append(result)

    def _read(self) -> list[LoggedResult]:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OptionError(f"Another demo writes to --checkpoint-jsonl '{self._path}': give each its own.") from None
        self._file.seek(0)
        content = self._file.read()
        whole, _, cut_off = content.rpartition(b"\n")
        if cut_off:
            self._file.truncate(len(content) - len(cut_off))
        try:
            return [msgspec.json.decode(line, type=LoggedResult) for line in whole.splitlines()]
        except msgspec.DecodeError as error:
            raise OptionError(
                f"'{self._path}' is no file of --checkpoint-jsonl: {error}. Choose another name, or remove it."
            ) from error
