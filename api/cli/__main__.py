"""The program `galaxyline`, and `python -m api.cli`: the command line without an installed script, for Ray jobs."""

import os
import signal
import sys

TYPE_CHECKING = False  # Importing it would take as long as the signals should be handled by.
if TYPE_CHECKING:
    from collections.abc import Callable

SIGNAL_BASE = 128
"""What shells add to a signal's number for the exit code of a process that it ended."""


def run() -> None:
    """Runs the command line, and exits. A signal that comes before work begins ends the process without a word."""
    _handle(signal.SIGINT, _leave)
    _handle(signal.SIGTERM, _leave)
    # Imported under these handlers: this, and what commands import, takes longer than a second keystroke.
    from api.cli.group import main, open_streams  # noqa: PLC0415

    open_streams()
    main(prog_name="galaxyline", obj=_begin_work)


def _begin_work() -> None:
    """Has a first signal end a command in good order from now on, as there is something to tidy up; a second at once.

    Before, exceptions would come out of the middle of imports, and some of these swallow them.
    """
    _handle(signal.SIGINT, _interrupt)
    _handle(signal.SIGTERM, _interrupt)


def _handle(number: int, handler: "Callable[[int, object], None]") -> None:
    # Where a parent has a signal ignored, as shells do for what runs in the background, it stays so.
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, handler)


def _leave(number: int, _: object) -> None:
    os._exit(SIGNAL_BASE + number)


def _interrupt(number: int, _: object) -> None:
    _handle(signal.SIGINT, _leave)
    _handle(signal.SIGTERM, _leave)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(SIGNAL_BASE + number)


if __name__ == "__main__":
    run()
