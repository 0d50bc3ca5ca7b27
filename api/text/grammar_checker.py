"""Whether a grammar can be served, found out before its request takes a slot, in bounded time."""

import contextlib
import hashlib
import os
import select
import subprocess  # nosec B404 # the interpreter itself
import sys
import threading
import time
import weakref
from collections import OrderedDict
from typing import IO, cast

import msgspec

from api.errors import EngineError, OverloadedError, RequestError
from api.text.grammar_process import COMPILE_SECONDS, LENGTH, Outcome, Verdict
from stages.errors import GrammarError
from stages.options import VocabularyOptions

CHECK_SECONDS = 10.0
"""The time that one check may take where the processors are busy with tokens."""

START_SECONDS = 60.0
"""The time that the process gets to read the tokenizer."""

WAIT_SECONDS = 10.0
"""The longest that a request waits for the checks of others."""

CLOSE_SECONDS = 1.0
"""How long the process gets to finish a check before it is ended."""

REMEMBERED = 1024
"""The latest verdicts, which need no process."""

SENTENCES: dict[Outcome, str] = {
    "time": f"takes more than {COMPILE_SECONDS} seconds to compile: make it smaller.",
    "broken": "takes too much memory to compile: make it smaller, or less deep.",
}


class GrammarChecker:
    """Tries grammars out in a process of its own, which is started with the first of them. Safe in several threads."""

    def __init__(self, vocabulary: VocabularyOptions) -> None:
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()
        self._process: _Process | None = None

    def check(self, source: str, param: str) -> None:
        """Raises RequestError, naming the field `param`, where the last stage could not compile the grammar.

        Takes up to CHECK_SECONDS for a grammar that was not seen lately, and START_SECONDS for the first. Raises
        OverloadedError where other grammars are in the way for too long.
        """
        verdict = self._verdict(source)
        if verdict.outcome == "accepted":
            return
        if verdict.outcome == "unusable":
            raise RequestError(f"{param} is not served with this model: {verdict.reason}", param)
        raise RequestError(f"{param} {SENTENCES.get(verdict.outcome) or f'cannot be served: {verdict.reason}'}", param)

    def close(self) -> None:
        """Ends the process, if there is one."""
        # A check that lasts comes to its end with the process.
        is_free = self._lock.acquire(timeout=CLOSE_SECONDS)
        try:
            self._end_process()
        finally:
            if is_free:
                self._lock.release()

    def _verdict(self, source: str) -> Verdict:
        key = hashlib.sha256(source.encode()).digest()
        if not self._lock.acquire(timeout=WAIT_SECONDS):
            raise OverloadedError("Too many grammars are being compiled: try again later.", 1)
        try:
            verdict = self._verdicts.pop(key, None) or self._asked(source)
            self._verdicts[key] = verdict
            if len(self._verdicts) > REMEMBERED:
                self._verdicts.popitem(last=False)
        finally:
            self._lock.release()
        return verdict

    def _asked(self, source: str) -> Verdict:
        # This grammar need not be refused because the process ended after the last one.
        for _ in range(2):
            try:
                if self._process is None:
                    self._process = _Process(self._vocabulary)
                return self._process.judge(source)
            except GrammarError as error:
                self._end_process()
                failure = error
        raise EngineError.for_clients(str(failure)) from failure

    def _end_process(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None


class _Process:
    """A `grammar_process` and the pipes to it."""

    def __init__(self, vocabulary: VocabularyOptions) -> None:
        """Raises GrammarError where it does not start."""
        self._process = subprocess.Popen(  # noqa: S603  # the interpreter itself
            [sys.executable, "-m", "api.text.grammar_process", msgspec.json.encode(vocabulary).decode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._input = cast("IO[bytes]", self._process.stdin)
        self._output = cast("IO[bytes]", self._process.stdout)
        self.close = weakref.finalize(self, _end, self._process)
        self._read(time.monotonic() + START_SECONDS)

    def judge(self, source: str) -> Verdict:
        """The verdict on a grammar. Raises GrammarError where none comes."""
        content = source.encode()
        until = time.monotonic() + CHECK_SECONDS
        self._write(LENGTH.pack(len(content)) + content, until)
        return msgspec.json.decode(self._read(until), type=Verdict)

    def _write(self, content: bytes, until: float) -> None:
        view = memoryview(content)
        while view:
            if not select.select([], [self._input], [], max(until - time.monotonic(), 0))[1]:
                raise GrammarError("The process that compiles grammars takes nothing in.")
            try:
                # What a pipe is ready for is written without waiting.
                view = view[os.write(self._input.fileno(), view[: select.PIPE_BUF]) :]
            except OSError as error:
                raise GrammarError("The process that compiles grammars has ended.") from error

    def _read(self, until: float) -> bytes:
        (length,) = LENGTH.unpack(self._read_exactly(LENGTH.size, until))
        return self._read_exactly(length, until)

    def _read_exactly(self, length: int, until: float) -> bytes:
        content = b""
        while len(content) < length:
            if not select.select([self._output], [], [], max(until - time.monotonic(), 0))[0]:
                raise GrammarError("The process that compiles grammars does not answer.")
            read = os.read(self._output.fileno(), length - len(content))
            if not read:
                raise GrammarError("The process that compiles grammars has ended.")
            content += read
        return content


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    for file in (process.stdin, process.stdout):
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()
    process.wait(CLOSE_SECONDS)
