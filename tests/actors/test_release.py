"""Hosts that run another release than the engine are refused with one sentence."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from actors.cluster.ray_private import setup_error
from actors.errors import ReleaseError, StartError
from actors.release import PACKAGES, ROOT, child_environment, code_digest, own_release, refuse_other_release
from actors.stage.actor import StageActor
from api.errors import exit_code
from weights.release import VERSION

OTHER = "galaxyline 9.9.9 with protocol 1 on Python 3.9"


def test_the_same_release_is_accepted() -> None:
    assert VERSION in own_release()
    refuse_other_release(own_release(), "host-1")


def test_another_release_is_refused_before_anything_of_it_is_read() -> None:
    environment = dict(os.environ)
    with pytest.raises(ReleaseError) as refused:
        StageActor(OTHER, "host-1", b"no setup of this release")
    assert str(refused.value) == (
        f"host-1 runs {own_release()} from {ROOT}, and the pipeline needs {OTHER}: "
        "install the same on every host of the cluster."
    )
    assert exit_code(refused.value) == 2
    assert dict(os.environ) == environment


def test_a_setup_of_the_same_release_has_to_be_one() -> None:
    with pytest.raises(msgspec.DecodeError):
        StageActor(own_release(), "host-1", b"")


@pytest.mark.parametrize(
    ("told", "kind", "sentence"),
    [
        (
            "The actor died because of an error raised in its creation task\n  File ...\n"
            "actors.errors.ReleaseError: host-1 runs another one: install the same.\n",
            ReleaseError,
            "^host-1 runs another one: install the same.$",
        ),
        (
            "The actor died\nModuleNotFoundError: No module named 'actors'",
            ReleaseError,
            rf"^host-1 has no galaxyline .*'actors'\), and the pipeline needs {re.escape(own_release())}: install",
        ),
        ("ImportError: cannot import name 'x' from 'stages.step' (/x.py)", ReleaseError, "host-1 has no galaxyline"),
        ("ModuleNotFoundError: No module named 'torch'", StartError, "^Stage 2 on host-1 could not be .* 'torch'$"),
        ("", StartError, "^Stage 2 on host-1 could not be set up: no cause was given$"),
    ],
)
def test_what_ray_tells_becomes_one_sentence(told: str, kind: type[Exception], sentence: str) -> None:
    failure = setup_error(2, "host-1", told)
    assert type(failure) is kind
    assert re.search(sentence, str(failure))


def test_other_code_of_the_same_version_is_another_release(tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors")
        )
    assert code_digest(tmp_path) == code_digest()
    assert code_digest() in own_release()
    code_digest.cache_clear()
    with (tmp_path / "stages" / "step.py").open("a", encoding="utf-8") as file:
        file.write("# Changed.\n")
    assert code_digest(tmp_path) != code_digest()


def imported(directory: Path, environment: dict[str, str]) -> str:
    """The file that a child started in `directory` imports as `stages`."""
    program = [sys.executable, "-c", "import stages; print(stages.__file__)"]
    return subprocess.run(program, cwd=directory, env=environment, check=True, capture_output=True, text=True).stdout


def test_a_child_imports_what_its_parent_imports_wherever_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in a checkout that is not installed, and was entered before the command was typed.
    monkeypatch.setattr("actors.release._is_installed", lambda _: False)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.chdir(ROOT)
    environment = child_environment({**os.environ, "PYTHONPATH": f"tests{os.pathsep}"})
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(ROOT), str(ROOT / "tests")]
    (tmp_path / "stages.py").write_text("raise SystemExit('not ours')")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert imported(empty, environment).strip() == str(ROOT / "stages" / "__init__.py")
