"""Clients in environments of their own: installed from an index, run against a server, judged by their result."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

MODEL = "galaxyline-sample"
INSTALL_S, RUN_S = 1800.0, 600.0
LINES_SHOWN = 30
"""How much of a failed client's output is shown."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """The server's address, and where a part of a client's work is done: `folder`, below `environment`."""

    url: str
    environment: Path
    folder: Path

    @property
    def python(self) -> str:
        """The interpreter of the environment."""
        return self.program("python")

    def program(self, name: str) -> str:
        """A program of the environment."""
        return str(self.environment / "env" / "bin" / name)


class Client(msgspec.Struct, frozen=True, kw_only=True):
    """A client's packages, the first of which gives its version.

    `needs` is what the packages need to run as clients, where they ask for much else, such as GPUs' libraries: they are
    installed without that then.
    """

    name: str
    packages: list[str]
    needs: list[str] = []
    is_node: bool = False


Judge = Callable[[Place, str], bool]
"""Whether a client that exited with 0 has done its work, by its files and its output."""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What a client is asked to do: the command to run once it is installed, and how its work is judged.

    One that `is_offline` is told not to ask Hugging Face's hub for what it has on disk.
    """

    client: Client
    name: str
    command: Callable[[Place], list[str]]
    passed: Judge
    is_offline: bool = True


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a part; `log` is the end of the client's output where it failed."""

    client: str
    part: str
    version: str
    passed: bool
    log: str = ""


def try_client(client: Client, parts: list[Part], url: str, root: Path) -> list[Outcome]:
    """Installs a client below `root`, where it is not there from an earlier run, and runs its parts."""
    environment = root / client.name
    try:
        version = _installed(client, environment)
    except (subprocess.SubprocessError, OSError) as error:
        return [Outcome(client=client.name, part="install", version="", passed=False, log=_log(error))]
    return [_try_part(part, version, url, environment) for part in parts]


def _try_part(part: Part, version: str, url: str, environment: Path) -> Outcome:
    place = Place(url=url, environment=environment, folder=environment / part.name)
    shutil.rmtree(place.folder, ignore_errors=True)
    place.folder.mkdir()
    hub = {"HF_HUB_OFFLINE": "1"} if part.is_offline else {}
    try:
        output = _run(part.command(place), place.folder, RUN_S, hub)
        passed, log = part.passed(place, output), _end(output)
    except (subprocess.SubprocessError, OSError) as error:
        passed, log = False, _log(error)
    return Outcome(client=part.client.name, part=part.name, version=version, passed=passed, log="" if passed else log)


def _installed(client: Client, environment: Path) -> str:
    """Makes a client's environment, and returns the client's version."""
    mark = environment / "version"
    if not mark.exists():
        environment.mkdir(parents=True, exist_ok=True)
        _install(client, environment)
        mark.write_text(_version(client, environment), encoding="utf-8")
    return mark.read_text(encoding="utf-8")


def _install(client: Client, environment: Path) -> None:
    if client.is_node:
        (environment / "package.json").write_text('{"private": true}', encoding="utf-8")
        _run(["npm", "install", "--no-fund", "--no-audit", *client.packages], environment, INSTALL_S)
        return
    _run([sys.executable, "-m", "venv", str(environment / "env")], environment, INSTALL_S)
    python = str(environment / "env" / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet"]
    if client.needs:
        # By pip, whose configuration may name other builds than the index has.
        _run([*pip, *client.needs], environment, INSTALL_S)
        _run([*pip, "--no-deps", *client.packages], environment, INSTALL_S)
        return
    # In a fraction of pip's time, where it is there.
    fast = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", python]
    has_uv = importlib.util.find_spec("uv") is not None
    _run([*(fast if has_uv else pip), *client.packages], environment, INSTALL_S)


def _version(client: Client, environment: Path) -> str:
    package = client.packages[0].partition("[")[0]
    if client.is_node:
        described = environment / "node_modules" / package / "package.json"
        return str(json.loads(described.read_bytes())["version"])
    code = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    return _run([str(environment / "env" / "bin" / "python"), "-c", code], environment, RUN_S).strip()


def _run(command: list[str], folder: Path, timeout_s: float, variables: dict[str, str] | None = None) -> str:
    """Runs a command in a client's folder and returns its output. Raises SubprocessError where it fails."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **(variables or {}), "NO_COLOR": "1", "HOME": str(folder)},
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
    )
    return done.stdout


def _log(error: Exception) -> str:
    output = getattr(error, "output", None) or str(error)
    return _end(output.decode(errors="replace") if isinstance(output, bytes) else output)


def _end(output: str) -> str:
    return "\n".join(output.splitlines()[-LINES_SHOWN:])
