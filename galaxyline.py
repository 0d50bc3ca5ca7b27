"""The program `galaxyline`: it refuses to run code of another project whose packages have the names of ours."""

import importlib.util
import sys
from pathlib import Path

PACKAGES = ("api", "actors", "stages", "weights")
USERS_MISTAKE = 2
"""The exit code of a mistake that the user can mend: see api/errors.py, which may be somebody else's here."""


def main() -> None:
    """Runs the command line, and exits."""
    foreign = foreign_package()
    if foreign is not None:
        name, directory = foreign
        sys.stderr.write(
            f"Error: {directory} has a package {name!r}, which Python finds before galaxyline's: take that directory "
            "out of PYTHONPATH, or install galaxyline in an environment of its own.\n"
        )
        sys.exit(USERS_MISTAKE)
    from api.cli.__main__ import run  # noqa: PLC0415 - not before it is known whose it is

    run()


def foreign_package() -> tuple[str, Path] | None:
    """Returns the first of PACKAGES that is not beside this file, and the directory that it lies in."""
    here = Path(__file__).resolve().parent
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None:
            continue
        # A package's directories; the file of a module that has the name of one.
        places = [*(spec.submodule_search_locations or ()), *([spec.origin] if spec.origin else [])]
        directory = Path(places[0]).parent
        if directory.resolve() != here:
            return name, directory
    return None
