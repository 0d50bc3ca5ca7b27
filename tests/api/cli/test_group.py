"""The group of commands: what it imports, what it says of mistakes and of the operating system, and its exit codes."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from api.cli.group import SUMMARIES, main, os_error_sentence
from api.settings.server import ServeSettings
from tests.support.command_line import refused, run
from weights.errors import GalaxylineError

HEAVY = ("torch", "ray", "transformers", "fastapi", "uvicorn", "tokenizers", "rich", "structlog", "numpy", "starlette")
PROGRAM = (sys.executable, "-m", "api.cli")


@pytest.mark.parametrize("command", ["", *SUMMARIES, "cache list"])
def test_help_imports_nothing_that_takes_long(command: str) -> None:
    code = (
        "import sys\n"
        "from api.cli.group import main\n"
        f"main({[*command.split(), '--help']!r}, standalone_mode=False)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith("Usage: ")
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_groups_help_has_every_command_with_its_own_first_paragraph() -> None:
    shown = run("--help").stdout
    for name, command in main.commands.items():
        first = (command.help or "").partition("\n\n")[0]
        assert SUMMARIES[name] == " ".join(first.split())
        assert f"\n  {name} " in shown


def test_a_mistyped_command_or_option_is_told_the_near_one() -> None:
    assert refused("serv") == "Error: No such command 'serv'. Did you mean 'serve'?"
    assert "--stages" in refused("serve", "--stage", "2")


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 2, "Cannot use '/x/y': Permission denied."),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "The operating system refuses: No space left on device."),
        (OSError(errno.EMFILE, "Too many open files", "/x"), 1, "Cannot use '/x': Too many open files."),
        (GalaxylineError("It broke."), 1, "It broke."),
    ],
)
def test_every_error_of_the_operating_system_is_one_sentence(
    error: Exception, code: int, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_: ServeSettings) -> None:
        raise error

    monkeypatch.setattr("api.server.serve.serve", fail)
    assert refused("serve", code=code) == f"Error: {sentence}"


def test_a_working_directory_that_is_gone_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert refused("plan", "r1") == "Error: The working directory does not exist any more: change to another one."
    assert "gone" not in os_error_sentence(OSError(errno.EIO, "Input/output error"))


def test_output_that_cannot_be_written_is_one_sentence() -> None:
    for arguments in (["plan", "r1"], ["--help"], ["--version"], ["cache", "list"]):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run([*PROGRAM, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert (done.returncode, done.stderr) == (1, "Error: Cannot write the output: No space left on device.\n")


def test_where_no_sentence_can_be_written_the_exit_code_tells() -> None:
    with Path("/dev/full").open("w") as full:
        assert subprocess.run([*PROGRAM, "convert", "absent"], stderr=full, check=False).returncode == 2


def test_a_reader_who_is_gone_ends_a_command_without_a_word() -> None:
    for arguments in (["plan", "r1"], ["cache", "list"]):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run([*PROGRAM, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
        os.close(writer)
        assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_a_closed_output_is_nothing_to_complain_of() -> None:
    command = " ".join([*PROGRAM, "plan", "r1", ">&-", "2>&-", "<&-"])
    assert subprocess.run(command, shell=True, check=False).returncode == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_of_another_encoding_gets_what_it_has(encoding: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C", "PYTHONUTF8": "0"}
    arguments = ["cache", "list", "--cache-dir", str(tmp_path / "weights-\u0416")]
    done = subprocess.run([*PROGRAM, *arguments], capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"weights-" in done.stdout
    planned = subprocess.run([*PROGRAM, "plan", "r1"], capture_output=True, env=environment, check=False)
    assert (planned.returncode, planned.stderr) == (0, b"")


def signalled(number: int, module: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Runs the program, which gets a signal when it imports `module`."""
    code = f"""
import os, signal, sys
# What runs in the background of a shell has it ignored, and so do the tests then.
signal.signal(signal.SIGINT, signal.default_int_handler)
class Finder:
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Finder())
sys.argv = ["galaxyline", *{arguments!r}]
from api.cli.__main__ import run
run()
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("module", ["api.cli.group", "api.settings.engine", "api.server.serve"])
def test_a_signal_while_a_command_is_imported_ends_it_without_a_word(number: int, module: str) -> None:
    done = signalled(number, module, "serve", "--port", "0")
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_command_works_has_it_tidy_up(number: int, tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import stages.converted_weights as converted
load = converted.ConvertedWeights.load
def interrupted(self, part):
    files = load(self, part)
    os.kill(os.getpid(), {number:d})
    return files
converted.ConvertedWeights.load = interrupted
sys.argv = ["galaxyline", "convert", "--cache-dir", {str(tmp_path)!r}, "--log-level", "error"]
from api.cli.__main__ import run
run()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (128 + number, "")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".building")] == []


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        ("galaxyline se", ["plain,serve"]),
        ("galaxyline serve --config /absent --max-mod", ["plain,--max-model-len"]),
        ("galaxyline serve --head-dtype bfloat8", ["plain,bfloat8_b"]),
    ],
)
def test_completion_of_shells_knows_commands_options_and_choices(words: str, completions: list[str]) -> None:
    environment = {
        **os.environ,
        "_GALAXYLINE_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    code = "import sys; sys.argv = ['galaxyline']; from api.cli.__main__ import run; run()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.splitlines() == completions


def test_commands_are_a_mapping_that_takes_others() -> None:
    group = click.Group("others", commands=type(main.commands)())
    group.add_command(click.Command("own"))
    assert "own" in group.commands
    assert len(group.commands) == len(SUMMARIES) + 1
    del group.commands["own"]
    assert set(group.commands) == set(SUMMARIES)
