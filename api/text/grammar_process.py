"""The process that tries out grammars: what a stranger's grammar costs, or breaks, it costs and breaks here.

llguidance bounds most of what a grammar can cost, but not all: five thousand properties take it seconds, and a thousand
references in a row more stack than there is, which ends the process. So each grammar is compiled in a fork of this
process, which has the tokenizer already, within limits of the kernel. `GrammarChecker` has the pipes' other ends.
"""

import os
import random
import resource
import signal
import struct
import sys
import threading
import time
from typing import BinaryIO, Literal

import msgspec
import numpy as np
from llguidance import LLMatcher, LLTokenizer

from stages.errors import GrammarError
from stages.options import VocabularyOptions
from stages.sampling.grammar import allowed_tokens, compile_grammar
from stages.sampling.vocabulary import load_vocabulary

COMPILE_SECONDS = 0.25
"""The processor time that a grammar's compilation and first mask may take: the last stage spends it again, and all
requests of a step wait there. Schemas of real clients take 1 to 50 milliseconds."""

COMPILE_BYTES = 1 << 28
"""The memory that a compilation may take. Each request with that grammar takes about as much as is used in the end."""

STACK_BYTES = 1 << 23
"""The stack that a compilation may take, an eighth of what the last stage has (MaskThread)."""

TRIAL_TOKENS = 32
TRIAL_SECONDS = 0.05
"""How far, and for how long at most, a compiled grammar is followed for a trial."""

NICENESS = 10
"""The priority of compilations below the server's own threads, which they must not slow down."""

LENGTH = struct.Struct(">I")

Outcome = Literal["accepted", "refused", "time", "broken", "unusable"]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a grammar; `reason` is the library's sentence where it was refused, or is unusable here.

    "time" is a compilation that was too long, "broken" one that took too much memory or stack. Where the tokenizer
    cannot be used every grammar is "unusable".
    """

    outcome: Outcome
    reason: str = ""


def read_frame(file: BinaryIO) -> bytes | None:
    """Reads what `write_frame` has written; None at the end."""
    header = file.read(LENGTH.size)
    if len(header) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(header)
    content = file.read(length)
    return content if len(content) == length else None


def write_frame(file: BinaryIO, content: bytes) -> None:
    """Writes bytes after their number."""
    file.write(LENGTH.pack(len(content)) + content)
    file.flush()


def judge(vocabulary: LLTokenizer, source: str) -> Verdict:
    """Compiles a grammar in a fork of this process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _compile_and_exit(vocabulary, source, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        content = file.read()
    _, status = os.waitpid(child, 0)
    if content and os.WIFEXITED(status):
        return msgspec.json.decode(content, type=Verdict)
    timed_out = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF
    return Verdict(outcome="time" if timed_out else "broken")


def _compile_and_exit(vocabulary: LLTokenizer, source: str, writer: int) -> None:
    """Compiles a grammar within the limits, writes the verdict, and ends this process, in any case."""
    try:
        os.nice(NICENESS)
        size = resource.getpagesize() * int(_first_field("/proc/self/statm"))
        resource.setrlimit(resource.RLIMIT_AS, (size + COMPILE_BYTES + STACK_BYTES,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        # Where it rings, it ends the process.
        signal.setitimer(signal.ITIMER_PROF, COMPILE_SECONDS)
        verdicts: list[Verdict] = []
        threading.stack_size(STACK_BYTES)
        thread = threading.Thread(target=lambda: verdicts.append(_compiled(vocabulary, source)))
        thread.start()
        thread.join()
        os.write(writer, msgspec.json.encode(verdicts[0]))
    finally:
        os._exit(0)


def _first_field(path: str) -> str:
    with open(path, encoding="ascii") as file:  # noqa: PTH123  # pathlib would be imported for this alone
        return file.read().split()[0]


def _compiled(vocabulary: LLTokenizer, source: str) -> Verdict:
    try:
        _try_out(compile_grammar(vocabulary, source), vocabulary)
    except GrammarError as error:
        return Verdict(outcome="refused", reason=str(error))
    return Verdict(outcome="accepted")


def _try_out(matcher: LLMatcher, vocabulary: LLTokenizer) -> None:
    """Follows the grammar for some tokens, as one may compile and be too complex for its answer's first words.

    Raises GrammarError as `allowed_tokens` does.
    """
    choose = random.Random(0).choice  # noqa: S311  # no secret
    until = time.process_time() + TRIAL_SECONDS
    for _ in range(TRIAL_TOKENS):
        tokens = np.flatnonzero(allowed_tokens(matcher, vocabulary.vocab_size))
        goes_on = tokens[~np.isin(tokens, vocabulary.eos_tokens)]
        if not len(goes_on) or time.process_time() > until:
            return
        matcher.consume_token(int(choose(goes_on)))


def main() -> None:
    """Answers each grammar that comes by standard input with a verdict, until that ends."""
    # An interrupt from a terminal is for the server, whose end is the end of standard input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    options = msgspec.json.decode(sys.argv[1], type=VocabularyOptions)
    unusable: Verdict | None = None
    try:
        vocabulary = load_vocabulary(options)
    except GrammarError as error:
        unusable = Verdict(outcome="unusable", reason=str(error))
    write_frame(sys.stdout.buffer, b"")
    while (source := read_frame(sys.stdin.buffer)) is not None:
        verdict = unusable or judge(vocabulary, source.decode())
        write_frame(sys.stdout.buffer, msgspec.json.encode(verdict))


if __name__ == "__main__":
    main()
