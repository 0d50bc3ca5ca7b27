"""The benchmark of clients: its parts are well formed, and a failing client is told from one that passed."""

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.clients.__main__ import main
from benchmarks.clients.client import Client, Part, Place, try_client
from benchmarks.clients.parts import CLIENTS, PARTS, SCRIPTS

HERE = Client(name="here", packages=["click"])


def command(code: str) -> Part:
    return Part(
        client=HERE,
        name="part",
        command=lambda _: [sys.executable, "-c", code],
        passed=lambda _, output: output.rstrip().endswith("passed"),
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder in which the client is installed already."""
    (tmp_path / HERE.name).mkdir()
    (tmp_path / HERE.name / "version").write_text("1.0", encoding="utf-8")
    return tmp_path


def test_every_part_has_a_name_of_its_own_and_every_client_a_part() -> None:
    names = [(part.client.name, part.name) for part in PARTS]
    assert len(set(names)) == len(names)
    assert {client.name for client in CLIENTS} == {client for client, _ in names}


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part.client.name}-{part.name}")
def test_every_command_can_be_made(part: Part, tmp_path: Path) -> None:
    made = part.command(Place(url="http://127.0.0.1:1", environment=tmp_path, folder=tmp_path))
    script = tmp_path / made[1]
    assert "http://127.0.0.1:1" in " ".join(made) or "http://127.0.0.1:1" in (tmp_path / "task.json").read_text("utf-8")
    assert made[0].startswith(str(tmp_path)) or made[0] == "node"
    if script.suffix in {".py", ".mjs"}:
        text = script.read_text(encoding="utf-8")
        assert f"def {part.name}(" in text or f"async {part.name}(" in text


def test_every_script_is_used(tmp_path: Path) -> None:
    place = Place(url="", environment=tmp_path, folder=tmp_path)
    used = {part.command(place)[1] for part in PARTS}
    assert {file.name for file in SCRIPTS.iterdir() if file.suffix in {".py", ".mjs"}} <= used


@pytest.mark.parametrize(
    ("code", "passed", "log"),
    [
        ("print('passed')", True, ""),
        ("print('half')", False, "half"),
        ("raise SystemExit('none of it')", False, "none of it"),
    ],
)
def test_a_client_is_judged_by_its_own_result(root: Path, code: str, passed: bool, log: str) -> None:
    (outcome,) = try_client(HERE, [command(code)], "http://127.0.0.1:1", root)
    assert (outcome.client, outcome.part, outcome.version) == ("here", "part", "1.0")
    assert (outcome.passed, outcome.log) == (passed, log)


def test_a_client_that_cannot_be_installed_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    node = Client(name="node", packages=["openai"], is_node=True)
    (outcome,) = try_client(node, [], "http://127.0.0.1:1", tmp_path)
    assert (outcome.part, outcome.passed) == ("install", False)
    assert "npm" in outcome.log


def test_only_known_clients_can_be_asked_for() -> None:
    refused = CliRunner().invoke(main, ["--only", "nobody"])
    assert refused.exit_code == 2
    assert all(client.name in refused.output for client in CLIENTS)
