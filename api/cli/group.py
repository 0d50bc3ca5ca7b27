"""The group of commands: each is imported when it is wanted, and its errors are shown as a sentence."""

import errno
import importlib
import io
import os
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import click

from weights.errors import GalaxylineError
from weights.release import VERSION

SUMMARIES = {
    "cache": "List, check and clear the converted weights below --cache-dir.",
    "chat": "Talk with the model of a running server.",
    "convert": "Convert the weights of MODEL, a directory or a hub id, into the weight cache, for any split.",
    "demo": "Complete PROMPTS, or those of a file, and print or write the completions and statistics.",
    "plan": "Say whether MODEL fits some Galaxy rows, and predict its speed there.",
    "reference": "Write a reference file for `demo --token-accuracy` with Hugging Face's model, in float32.",
    "serve": "Serve MODEL, a directory or a hub id, over HTTP; without one, the sample model.",
    "status": "Show what the stages of a running server do, until Ctrl-C.",
}
"""Every command with its line in the help of the group, which imports none of them for that."""

USERS_MISTAKES = frozenset(
    {
        *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EROFS),
        *(errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
    }
)
"""Failures of the operating system that another path or other rights would mend: exit code 2, all others 1."""

INTERRUPTED = 130
"""The exit code after Ctrl-C: 128 + SIGINT, as shells count."""

BROKEN_PIPE = 141
"""The exit code where nobody reads the output any more, as in `galaxyline plan r1 | head -1`: 128 + SIGPIPE."""


class Commands(MutableMapping[str, click.Command]):
    """The commands by name, each imported from the module of its name when it is looked up."""

    def __init__(self) -> None:
        self._others: dict[str, click.Command] = {}

    def __getitem__(self, name: str) -> click.Command:
        if name in self._others:
            return self._others[name]
        if name not in SUMMARIES:
            raise KeyError(name)
        command: click.Command = getattr(importlib.import_module(f"api.cli.{name}"), f"{name}_command")
        return command

    def __setitem__(self, name: str, command: click.Command) -> None:
        self._others[name] = command

    def __delitem__(self, name: str) -> None:
        del self._others[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*SUMMARIES, *self._others}))

    def __len__(self) -> int:
        return len({*SUMMARIES, *self._others})


class CommandGroup(click.Group):
    """Shows errors as a sentence on stderr, without a traceback, and exits with the code of their class."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the commands with their summaries."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, SUMMARIES.get(name, "")) for name in self.list_commands(ctx)])

    def main(self, *args: Any, **extra: Any) -> Any:
        """Runs the command line as click does; errors of ours and of the operating system are told in a sentence."""
        try:
            return super().main(*args, **extra)
        except GalaxylineError as error:
            from api.errors import StoppedError, exit_code  # noqa: PLC0415 - needed here alone

            # Whoever has sent the signal knows why.
            if not isinstance(error, StoppedError):
                _tell(f"{error}")
            sys.exit(exit_code(error))
        except OSError as error:
            _tell(os_error_sentence(error))
            sys.exit(2 if error.errno in USERS_MISTAKES else 1)

    def invoke(self, ctx: click.Context) -> object:
        """Runs the command; what click has other exit codes for, shells count as signals."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:
            # What is left would fail again when Python ends, and Python would complain.
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(BROKEN_PIPE)
        return result


def _tell(sentence: str) -> None:
    # Where that cannot be written either, the exit code has to do.
    with suppress(OSError):
        click.echo(f"Error: {sentence}", err=True)


def os_error_sentence(error: OSError) -> str:
    """What an error of the operating system that nothing else explains says to the user."""
    reason = error.strerror or str(error) or type(error).__name__
    if error.filename is not None:
        return f"Cannot use '{os.fsdecode(error.filename)}': {reason}."
    if error.errno == errno.ENOENT and not _has_working_directory():
        return "The working directory does not exist any more: change to another one."
    return f"The operating system refuses: {reason}."


def _has_working_directory() -> bool:
    try:
        Path.cwd()
    except OSError:
        return False
    return True


class OutputError(GalaxylineError):
    """What a command prints cannot be written, as on a full disk."""


class Output(io.TextIOWrapper):
    """The standard output of a command.

    A character that the terminal's encoding does not have is written as its number. Raises BrokenPipeError where
    nobody reads any more, and OutputError where writing fails otherwise.
    """

    def __init__(self, stream: io.TextIOWrapper) -> None:
        line_buffering, encoding = stream.line_buffering, stream.encoding
        super().__init__(stream.detach(), encoding, "backslashreplace", line_buffering=line_buffering)

    def write(self, text: str, /) -> int:
        """Writes a text, or fills the buffer with it."""
        with _told():
            return super().write(text)

    def flush(self) -> None:
        """Writes what is in the buffer."""
        with _told():
            super().flush()


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"Cannot write the output: {error.strerror}.") from error


def open_streams() -> None:
    """Opens standard streams that are closed on nothing, as daemons do: the next file would get their numbers."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = Output(cast("io.TextIOWrapper", sys.stdout or os.fdopen(1, "w")))
    sys.stderr = sys.stderr or os.fdopen(2, "w", errors="backslashreplace")


@click.group(
    cls=CommandGroup,
    commands=Commands(),
    context_settings={
        "token_normalize_func": lambda name: name.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
        "max_content_width": 120,
    },
)
@click.version_option(VERSION, prog_name="galaxyline")
def main() -> None:
    """DeepSeek-V3/R1 over a pipeline of stages. Options may be spelt with - or _."""
