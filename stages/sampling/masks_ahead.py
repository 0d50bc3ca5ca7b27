"""The thread beside the compute thread that prepares what requests may draw next while their steps are on the way."""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

import structlog

from stages.errors import GrammarError
from stages.options import VocabularyOptions
from stages.sampling.constraint import Constraint
from stages.sampling.grammar import GrammarCompiler, Mask
from stages.sampling.vocabulary import load_vocabulary
from stages.step import SamplingParams

MASK_SECONDS = 10.0
"""The longest that a step waits for one mask. llguidance's own limits end a mask after some ten milliseconds, and what
takes longer to compile than a quarter of a second is refused by the front end: this is for what nobody foresaw."""

STACK_BYTES = 1 << 26
"""The thread's stack. llguidance compiles nested rules recursively; the front end refuses what needs 8 MB of stack."""

log = structlog.get_logger()


class MaskThread:
    """Runs jobs in order, on one thread that is started with the first of them; any thread may submit them.

    The vocabulary is read when the object is made, as it takes a second in which no other thread runs Python.
    """

    def __init__(self, options: VocabularyOptions | None, size: int) -> None:
        """`size` is the number of tokens that have logits. Where the vocabulary cannot be read, grammars fail later."""
        self._size = size
        self._compiler = _compiler(options)
        self._jobs: queue.SimpleQueue[tuple[Future[Mask | None], Callable[[], Mask | None]] | None] = (
            queue.SimpleQueue()
        )
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def constraint(self, sampling: SamplingParams, answer: Sequence[int]) -> Constraint:
        """The constraint of a request with these tokens in its answer. Raises GrammarError as Constraint does."""
        return Constraint(sampling, answer, self._size, self._compiler)

    def submit(self, job: Callable[[], Mask | None]) -> "Future[Mask | None]":
        """Has the thread do `job` after those that were submitted before."""
        done: Future[Mask | None] = Future()
        self._jobs.put((done, job))
        with self._starting:
            if self._thread is None:
                self._start()
        return done

    def replace(self) -> None:
        """Lets another thread do the jobs that wait, as this one is lost in one of them."""
        log.error("the thread of masks is replaced, as a grammar took too long", seconds=MASK_SECONDS)
        with self._starting:
            self._start()

    def close(self) -> None:
        """Ends the thread once it has done what was submitted; does not wait for that."""
        if self._thread is not None:
            self._jobs.put(None)

    def _start(self) -> None:
        size = threading.stack_size(STACK_BYTES)
        try:
            self._thread = threading.Thread(target=self._run, name="masks", daemon=True)
            self._thread.start()
        finally:
            threading.stack_size(size)

    def _run(self) -> None:
        while self._thread is threading.current_thread() and (entry := self._jobs.get()) is not None:
            done, job = entry
            if not done.set_running_or_notify_cancel():
                continue
            try:
                mask = job()
            except GrammarError as error:
                done.set_exception(error)
            except BaseException as error:  # a panic of the library is not an Exception
                done.set_exception(GrammarError(f"The grammar's next tokens: {type(error).__name__}: {error}"))
            else:
                done.set_result(mask)


class MasksAhead:
    """What one request may draw next; each mask is begun as soon as the token before it is drawn."""

    def __init__(self, thread: MaskThread, sampling: SamplingParams, answer: Sequence[int]) -> None:
        """`answer` are the request's tokens after its prompt. Its constraint is made on the thread."""
        self._thread = thread
        self._sampling = sampling
        self._constraint: Constraint | None = None
        tokens = list(answer)
        self._next = thread.submit(lambda: self._begin(tokens))

    def allowed(self) -> Mask | None:
        """The tokens that may come next, [vocabulary]; None for all.

        Waits until they are known. Raises GrammarError where there are none, or it takes longer than MASK_SECONDS.
        """
        try:
            return self._next.result(MASK_SECONDS)
        except FutureTimeoutError:
            self._thread.replace()
            raise GrammarError(f"The grammar's next tokens were not known after {MASK_SECONDS:.0f} seconds.") from None

    def allowed_within(self, seconds: float) -> Mask | None:
        """What `allowed` returns, for a guess: raises GrammarError too where it takes longer than these `seconds`."""
        try:
            return self._next.result(seconds)
        except FutureTimeoutError:
            raise GrammarError("The grammar's next tokens are not known yet.") from None

    def note(self, token: int) -> None:
        """Takes in the token that was drawn, and begins with what may follow it."""
        self._next = self._thread.submit(lambda: self._go_on(token))

    def cancel(self) -> None:
        """Gives up what has not begun, as the request has ended."""
        self._next.cancel()

    def _begin(self, answer: Sequence[int]) -> Mask | None:
        self._constraint = self._thread.constraint(self._sampling, answer)
        return self._constraint.allowed()

    def _go_on(self, token: int) -> Mask | None:
        if self._constraint is None:
            raise GrammarError("The grammar has failed before.")
        self._constraint.note(token)
        return self._constraint.allowed()


def _compiler(options: VocabularyOptions | None) -> GrammarCompiler | None:
    if options is None:
        return None
    try:
        return GrammarCompiler(load_vocabulary(options))
    except GrammarError as error:
        log.warning("grammars cannot be followed", reason=str(error))
        return None
