"""The code that all processes of a pipeline have to run, and the environment in which a child imports it."""

import functools
import hashlib
import os
import site
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from actors.errors import ReleaseError
from stages.step import PROTOCOL_VERSION
from weights.release import VERSION

ROOT = Path(__file__).resolve().parents[1]
"""The directory from which this process imports the project's packages."""

PACKAGES = ("actors", "stages", "weights")
"""What a stage runs."""

DIGEST_CHARACTERS = 12


@functools.cache
def code_digest(root: Path = ROOT) -> str:
    """Returns a digest of the source of PACKAGES below `root`, which distinguishes different code of one version."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()[:DIGEST_CHARACTERS]


def own_release() -> str:
    """Returns the release that this process runs, as text; two processes fit together where it is the same.

    Patch releases of Python are left out, as what passes between processes is the same in all of them.
    """
    return (
        f"galaxyline {VERSION} (code {code_digest()}) with protocol {PROTOCOL_VERSION} on Python "
        f"{sys.version_info[0]}.{sys.version_info[1]}"
    )


def refuse_other_release(wanted: str, host: str) -> None:
    """Raises ReleaseError unless this process, on `host`, runs the release `wanted`."""
    if own_release() != wanted:
        raise ReleaseError(release_sentence(host, f"runs {own_release()} from {ROOT}", wanted))


def release_sentence(host: str, what: str, wanted: str) -> str:
    """Returns a sentence on `what` a host has instead of the release that is `wanted` on all."""
    return f"{host} {what}, and the pipeline needs {wanted}: install the same on every host of the cluster."


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of a process that imports what this one imports, whatever its working directory.

    Relative entries of PYTHONPATH keep their meaning. The directory of a checkout that is not installed, which is on
    this process's path because it was started there, is on the child's too.
    """
    entries = [str(Path(entry).absolute()) for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if not _is_installed(ROOT) and str(ROOT) in {str(Path(entry).absolute()) for entry in sys.path}:
        entries.insert(0, str(ROOT))
    path = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(entries))} if entries else {}
    without = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    # From Python 3.11 on; for those before, the child's working directory must hold no modules.
    return {**without, **path, "PYTHONSAFEPATH": "1"}


def _is_installed(root: Path) -> bool:
    """Whether every interpreter of this environment has the directory on its path."""
    return str(root) in {*sysconfig.get_paths().values(), *site.getsitepackages(), site.getusersitepackages()}
