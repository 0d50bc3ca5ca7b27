"""The undocumented parts of Ray that the project uses are in the Ray that is installed.

Its files are read and not imported, as Ray reads its environment when it is; no cluster is started.
"""

import ast
import importlib.util
from pathlib import Path

import pytest

from actors.cluster import ray_private
from actors.cluster.environment import prepare_environment
from actors.errors import ReleaseError, StartError

SPEC = importlib.util.find_spec("ray")
assert SPEC is not None
assert SPEC.origin is not None
RAY = Path(SPEC.origin).parent
RAYLET = RAY / "core" / "src" / "ray" / "raylet" / "raylet"


def source(path: str, name: str) -> str:
    """Returns the source of a top-level function or class of one of Ray's files; fails if there is none."""
    text = (RAY / path).read_text(encoding="utf-8")
    [found] = [node for node in ast.parse(text).body if getattr(node, "name", None) == name]
    return ast.get_source_segment(text, found) or ""


def test_what_the_user_has_set_stays() -> None:
    environment = {"RAY_worker_niceness": "7"}
    ray_private.set_environment(environment, is_loopback=False)
    assert environment == {**ray_private.ENVIRONMENT, "RAY_worker_niceness": "7"}
    ray_private.set_environment(environment, is_loopback=True)
    assert environment == {**ray_private.ENVIRONMENT, "RAY_worker_niceness": "7", **ray_private.LOOPBACK_ENVIRONMENT}


def test_python_code_of_ray_reads_the_variables() -> None:
    constants = (RAY / "_private/ray_constants.py").read_text(encoding="utf-8")
    [loopback] = ray_private.LOOPBACK_ENVIRONMENT
    assert f'ENABLE_RAY_CLUSTERS_ENV_VAR = "{loopback}"' in constants
    assert '"RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL"' in source("_private/utils.py", "check_version_info")


@pytest.mark.parametrize("name", ["raylet_start_wait_time_s", "worker_niceness", ray_private.STARTUP_CONCURRENCY])
def test_the_raylet_has_the_settings(name: str) -> None:
    assert name.encode() in RAYLET.read_bytes()


def test_ray_starts_a_node_from_the_parameters_that_the_project_gives() -> None:
    parameters = source("_private/parameter.py", "RayParams")
    given = ("node_ip_address", "num_cpus", "resources", "object_store_memory", "temp_dir", "include_dashboard")
    for name in (*given, "include_log_monitor", "no_monitor", "dashboard_agent_listen_port", "_system_config"):
        assert f"        {name}: Optional[" in parameters
    node = source("_private/node.py", "Node")
    assert "def start_api_server(\n        self, *, include_dashboard: Optional[bool], raise_on_failure: bool" in node
    assert "if not self._ray_params.no_monitor:" in node
    assert "if self._ray_params.include_log_monitor:" in node
    assert "self.all_processes: dict" in node
    # Ray takes its undocumented arguments as `**kwargs` and refuses those that it does not pop from them.
    assert 'kwargs.pop("_node_ip_address"' in source("_private/worker.py", "init")


def test_the_raylet_takes_other_commands_and_ports_of_agents() -> None:
    arguments = ray_private.raylet_arguments({})
    binary = RAYLET.read_bytes()
    assert arguments
    for argument in arguments:
        flag, _, value = argument.removeprefix("--").partition("=")
        assert flag.encode() in binary
        assert value in {'/bin/sh -c "exec cat"', str(ray_private.NO_PORT)}
    assert ray_private.PIPED_AGENTS.encode() in binary
    start = source("_private/services.py", "start_raylet")
    # Behind Ray's own, as the last one counts.
    assert start.index("command = [") < start.index("process_info = start_ray_process(\n        command,")
    assert "ray._private.services.start_raylet(" in source("_private/node.py", "Node")


def test_a_job_that_may_want_a_runtime_environment_has_the_agent_that_makes_it() -> None:
    constants = (RAY / "_private/runtime_env/constants.py").read_text(encoding="utf-8")
    assert f'RAY_JOB_CONFIG_JSON_ENV_VAR = "{ray_private.JOB_CONFIG_VARIABLE}"' in constants
    assert ray_private.raylet_arguments({ray_private.JOB_CONFIG_VARIABLE: "{}"}) == []


def test_ray_uploads_no_working_directory_below_uv() -> None:
    constants = (RAY / "_private/ray_constants.py").read_text(encoding="utf-8")
    assert 'env_bool("RAY_ENABLE_UV_RUN_RUNTIME_ENV", True)' in constants
    assert ray_private.ENVIRONMENT["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "0"


def test_ray_ends_its_error_listener_as_the_project_ends_it() -> None:
    disconnect = source("_private/worker.py", "disconnect")
    for step in ("threads_stopped.set()", "gcs_error_subscriber.close()", "listener_thread.join()"):
        assert f"worker.{step}" in disconnect
    assert "threads_stopped.is_set()" in source("_private/worker.py", "listen_error_messages")


def test_the_tables_of_actors_and_jobs_have_the_fields() -> None:
    tables = source("_private/state.py", "GlobalState")
    assert "actor_state_name: Optional[str]" in tables
    for field in ("JobID", "Address", "IPAddress", "ActorClassName", "Entrypoint", "DriverPid", "DriverIPAddress"):
        assert f'"{field}"' in tables


def test_the_text_of_a_failed_constructor_ends_with_its_exception() -> None:
    prepare_environment(None)
    from ray.exceptions import ActorDiedError, RayTaskError  # noqa: PLC0415 - Ray reads the environment

    def died(cause: Exception) -> str:
        traceback = f"Traceback (most recent call last):\n{type(cause).__module__}.{type(cause).__name__}: {cause}\n"
        error = RayTaskError("StageActor.__init__", traceback, cause)  # type: ignore[no-untyped-call]
        return str(ActorDiedError(error))

    refused = ray_private.setup_error(1, "host-a", died(ReleaseError("host-a runs another one.")))
    assert (type(refused), str(refused)) == (ReleaseError, "host-a runs another one.")
    other = ray_private.setup_error(1, "host-a", died(ValueError("no such thing")))
    assert (type(other), str(other)) == (
        StartError,
        "Stage 1 on host-a could not be set up: builtins.ValueError: no such thing",
    )
