"""docs/deploy: images, manifests and units name things that exist in this program and in Ray."""

import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.cluster.placement import ROWS
from api.cli.group import main
from api.server.http_server import CLOSE_MARGIN_S
from api.settings.environment import CACHE_VARIABLE
from stages.wormhole import GALAXY_ROWS
from tests import ROOT

DEPLOY = ROOT / "docs" / "deploy"
UNITS = {unit.name: unit for unit in sorted((DEPLOY / "systemd").glob("*.service"))}
BIN = "/opt/galaxyline/bin/"
GALAXIES = 4
RAY_PORT, DASHBOARD_PORT = 6379, 8265
STAGES_END_S = 10.0
"""How long `actors.stage.group` gives stages and their processes to end. It is not imported, as it imports Ray,
whose first import in a process has to be that of a pipeline."""

PARSE = """
import json, sys
from ray.scripts.scripts import start
lines = json.load(sys.stdin)
print(json.dumps({name: start.make_context("start", line).params for name, line in lines.items()}, default=str))
"""

every_unit = pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)


@functools.cache
def manifests() -> dict[str, dict[str, Any]]:
    """Returns all Kubernetes manifests, by kind."""
    files = [DEPLOY / "raycluster.yaml", DEPLOY / "rayjob.yaml"]
    return {found["kind"]: found for file in files for found in yaml.safe_load_all(file.read_text(encoding="utf-8"))}


def groups() -> Iterator[dict[str, Any]]:
    spec = manifests()["RayCluster"]["spec"]
    yield spec["headGroupSpec"]
    yield from spec["workerGroupSpecs"]


def pods() -> Iterator[dict[str, Any]]:
    for template in [*(group["template"] for group in groups()), manifests()["RayJob"]["spec"]["submitterPodTemplate"]]:
        yield template["spec"]


def serve_options(words: list[str]) -> dict[str, Any]:
    """Returns the options in the words of a command; fails unless it is `galaxyline serve` with options that exist."""
    assert words[:2] == ["galaxyline", "serve"]
    return main.commands["serve"].make_context("serve", words[2:]).params


def settings(unit: Path) -> dict[str, list[str]]:
    lines = unit.read_text(encoding="utf-8").replace("\\\n", " ")
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", lines, re.MULTILINE):
        found.setdefault(name, []).append(value)
    return found


def started(unit: Path) -> list[str]:
    """Returns the words of the command that a unit starts, as systemd reads them from it and the environment file."""
    [command] = settings(unit)["ExecStart"]
    for name, [value] in settings(DEPLOY / "systemd" / "cluster.env").items():
        command = command.replace(f"${{{name}}}", value)
    assert "$" not in command
    assert command.startswith(BIN)
    return shlex.split(command.removeprefix(BIN))


def must_end_within(shutdown_timeout_s: float) -> float:
    """Returns how long a server takes to end at most: requests, responses, stages and their processes."""
    return shutdown_timeout_s + CLOSE_MARGIN_S + STAGES_END_S


def rows_of(options: dict[str, Any]) -> int:
    return int(options["stages"]) * int(options["rows_per_stage"])


@pytest.fixture(scope="module")
def ray_start() -> dict[str, dict[str, Any]]:
    """What Ray reads from every `ray start` of the documents; fails where Ray does not have one of its options."""
    lines = {name: started(UNITS[f"galaxyline-ray-{name}.service"]) for name in ("head", "worker")}
    for group, role in zip(groups(), ("--head", f"--address=head:{RAY_PORT}"), strict=True):
        # KubeRay makes a line of them for a shell.
        parameters = " ".join(f"--{name}={value}" for name, value in group["rayStartParams"].items())
        lines["pod of " + group.get("groupName", "head")] = ["ray", "start", role, *shlex.split(parameters)]
    assert all(line[:2] == ["ray", "start"] for line in lines.values())
    done = subprocess.run(
        [sys.executable, "-c", PARSE],
        input=json.dumps({name: line[2:] for name, line in lines.items()}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    parsed: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return parsed


# Kubernetes


def test_hosts_of_the_manifest_offer_their_rows(ray_start: dict[str, dict[str, Any]]) -> None:
    for group, name in zip(groups(), ("head", "galaxies"), strict=True):
        [container] = group["template"]["spec"]["containers"]
        assert ray_start[f"pod of {name}"]["num_cpus"] == int(container["resources"]["limits"]["cpu"])
    assert json.loads(ray_start["pod of galaxies"]["resources"]) == {ROWS: GALAXY_ROWS}
    _, galaxies = groups()
    assert galaxies["replicas"] == galaxies["minReplicas"] == galaxies["maxReplicas"] == GALAXIES


def test_the_manifests_agree_with_each_other_and_with_the_image() -> None:
    cluster, job, service = (manifests()[kind] for kind in ("RayCluster", "RayJob", "Service"))
    assert cluster["spec"]["rayVersion"] == version("ray")
    images = {container["image"] for pod in pods() for container in pod["containers"]}
    assert images == {f"galaxyline:{version('galaxyline')}"}
    assert f"-t {images.pop()} " in (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    own = {"ray.io/cluster": cluster["metadata"]["name"]}
    assert job["spec"]["clusterSelector"] == own
    assert service["spec"]["selector"] == {**own, "ray.io/node-type": "head"}
    [head] = next(groups())["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in head["ports"]}
    serving = serve_options(shlex.split(job["spec"]["entrypoint"]))
    assert ports == {"gcs-server": RAY_PORT, "dashboard": DASHBOARD_PORT, "api": serving["port"]}
    [api] = service["spec"]["ports"]
    assert (api["targetPort"], api["port"]) == ("api", serving["port"])
    submitter = job["spec"]["submitterPodTemplate"]["spec"]["containers"][0]
    [token] = [entry["valueFrom"]["secretKeyRef"] for entry in submitter["env"] if entry["name"] == "RAY_AUTH_TOKEN"]
    assert token == {"name": cluster["spec"]["authOptions"]["secretName"], "key": "auth_token"}


def test_the_job_fits_the_cluster_and_has_time_to_drain() -> None:
    job = manifests()["RayJob"]["spec"]
    options = serve_options(shlex.split(job["entrypoint"]))
    assert (options["device"], rows_of(options)) == ("ttnn", GALAXIES * GALAXY_ROWS)
    variables = yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]
    assert float(variables["RAY_JOB_STOP_WAIT_TIME_S"]) > must_end_within(options["shutdown_timeout_s"])
    head = next(groups())["template"]["spec"]
    assert head["terminationGracePeriodSeconds"] > float(variables["RAY_JOB_STOP_WAIT_TIME_S"])


def test_pods_have_the_chips_and_no_more_rights_than_they_need() -> None:
    head, galaxy, submitter = pods()
    for pod in (head, submitter):
        for container in pod["containers"]:
            assert container["securityContext"]["runAsNonRoot"]
            assert not container["securityContext"]["allowPrivilegeEscalation"]
    [container] = galaxy["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in galaxy["volumes"]}
    assert set(mounts.values()) == set(volumes)
    assert volumes[mounts["/dev/tenstorrent"]]["hostPath"]["path"] == "/dev/tenstorrent"
    assert volumes[mounts["/dev/hugepages-1G"]]["emptyDir"]["medium"] == "HugePages-1Gi"
    assert container["resources"]["limits"]["hugepages-1Gi"] == container["resources"]["requests"]["hugepages-1Gi"]


# The image


def instructions() -> list[tuple[str, str]]:
    lines = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    return [(words[0], words[1]) for line in lines if (words := line.split(maxsplit=1)) and not line.startswith("#")]


def test_the_image_is_built_of_what_there_is_and_is_not_roots() -> None:
    names = {name for name, _ in instructions()}
    assert names <= {"ARG", "CMD", "COPY", "ENV", "EXPOSE", "FROM", "RUN", "STOPSIGNAL", "USER", "WORKDIR"}
    copied = [what.split() for name, what in instructions() if name == "COPY" and not what.startswith("--from")]
    sources = {source for *some, _ in copied for source in some}
    assert {"actors", "api", "stages", "weights", "pyproject.toml", "constraints-ttnn.txt"} <= sources
    assert [source for source in sources if not (ROOT / source).exists()] == []
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == sources
    assert "*" in ignored
    [*_, user] = [what for name, what in instructions() if name == "USER"]
    assert user == str(next(pods())["containers"][0]["securityContext"]["runAsUser"]) != "0"


def test_the_image_has_a_python_that_ttnn_has_and_serves() -> None:
    bases = {what.split()[0] for name, what in instructions() if name == "FROM"}
    [base] = bases
    assert re.fullmatch(r"python:3\.(10|12)-slim-\w+", base)
    installed = [what for name, what in instructions() if name == "RUN" and "pip install" in what]
    assert all("-c constraints-ttnn.txt" in what for what in installed)
    [command] = [json.loads(what) for name, what in instructions() if name == "CMD"]
    assert serve_options(command)["port"] == int(next(what for name, what in instructions() if name == "EXPOSE"))
    variables = " ".join(what for name, what in instructions() if name == "ENV")
    assert f"{CACHE_VARIABLE}=/cache" in variables
    assert "RAY_EXPERIMENTAL_NOSET_TENSTORRENT_VISIBLE_DEVICES=1" in variables


# systemd


@every_unit
def test_a_unit_keeps_the_token_to_itself_and_ends_its_main_process_first(unit: Path) -> None:
    found = settings(unit)
    assert found["EnvironmentFile"] == ["/etc/galaxyline/cluster.env"]
    assert "RAY_AUTH_MODE=token" in found["Environment"]
    assert found["KillMode"] == ["mixed"]
    assert found["User"] == ["galaxyline"]
    assert "PrivateTmp" not in found


def test_the_environment_file_has_no_token_of_ours_and_is_to_be_private() -> None:
    file = DEPLOY / "systemd" / "cluster.env"
    assert settings(file)["RAY_AUTH_TOKEN"] == [""]
    assert "--mode 0600" in file.read_text(encoding="utf-8")


def test_nodes_of_the_units_join_each_other(ray_start: dict[str, dict[str, Any]]) -> None:
    head, worker = ray_start["head"], ray_start["worker"]
    assert (head["head"], head["block"], int(head["port"])) == (True, True, RAY_PORT)
    assert head["dashboard_host"] == "127.0.0.1"
    assert (worker["head"], worker["block"]) == (False, True)
    assert worker["address"] == f"{head['node_ip_address']}:{RAY_PORT}"
    assert json.loads(worker["resources"]) == {ROWS: GALAXY_ROWS}
    variables = settings(UNITS["galaxyline-ray-worker.service"])["Environment"]
    assert "RAY_EXPERIMENTAL_NOSET_TENSTORRENT_VISIBLE_DEVICES=1" in variables


def test_the_server_joins_the_head_and_has_time_to_drain() -> None:
    unit = UNITS["galaxyline.service"]
    options = serve_options(started(unit))
    assert options["ray_address"].endswith(f":{RAY_PORT}")
    assert (options["host"], options["device"]) == ("127.0.0.1", "ttnn")
    [seconds] = settings(unit)["TimeoutStopSec"]
    assert float(seconds) > must_end_within(options["shutdown_timeout_s"])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    # It looks for the programs too: this environment has them under another path.
    programs = f"{Path(sys.executable).parent}/"
    for name, unit in UNITS.items():
        (tmp_path / name).write_text(unit.read_text(encoding="utf-8").replace(BIN, programs), encoding="utf-8")
    files = [str(tmp_path / name) for name in UNITS]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *files], capture_output=True, text=True, timeout=60, check=False
    )
    # It names machines' own units that it finds fault with as well.
    assert [line for line in done.stderr.splitlines() if str(tmp_path) in line] == []
    assert done.returncode == 0, done.stderr
