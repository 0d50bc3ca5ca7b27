"""The program `galaxyline`: whose packages it runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from galaxyline import PACKAGES, foreign_package
from weights.release import VERSION

PROGRAM = Path(sys.executable).with_name("galaxyline")


def run(directory: Path, path: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [PROGRAM, "--version"], cwd=directory, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("form", ["package", "module", "directory"])
def test_a_package_of_the_same_name_in_front_of_ours_is_named(name: str, form: str, tmp_path: Path) -> None:
    if form == "module":
        (tmp_path / f"{name}.py").touch()
    else:
        (tmp_path / name).mkdir()
    if form == "package":
        (tmp_path / name / "__init__.py").touch()
    done = run(tmp_path, str(tmp_path))
    if form == "directory" and done.returncode == 0:
        # Where ours is installed as files, Python prefers a package to a mere directory.
        assert done.stdout == f"galaxyline, version {VERSION}\n"
        return
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"Error: {tmp_path} has a package {name!r}, which Python finds before galaxyline's: ")
    assert done.stderr.count("\n") == 1


def test_the_working_directory_does_not_matter(tmp_path: Path) -> None:
    for name in PACKAGES:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not ours')")
    assert run(tmp_path, "").stdout == f"galaxyline, version {VERSION}\n"


def test_our_own_packages_are_not_foreign() -> None:
    assert foreign_package() is None
