"""Everything in the project that depends on what Ray does not document: private names, settings and texts.

tests/actors/cluster/test_ray_private.py compares them with the Ray that is installed. Ray itself is imported within
the functions only, because the variables named here have to be set before that happens.
"""

import importlib
import os
import re
import subprocess
from collections import Counter
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from actors.cluster import fork_client
from actors.errors import ClusterError, ReleaseError, StartError
from actors.release import own_release, release_sentence
from weights.errors import GalaxylineError

RAY_START_SECONDS = 60
"""How long Ray's processes may take to start. By default they get 30 s, which a busy host misses."""

ENVIRONMENT = {
    "RAY_raylet_start_wait_time_s": str(RAY_START_SECONDS),
    # By the default of 15, a stage that has sent its result to the engine waits until the engine has processed it.
    "RAY_worker_niceness": "0",
    # Ray refuses a process that runs another patch release of Python, unless only the minor release has to be equal.
    "RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL": "minor",
    # A driver below `uv run` would otherwise upload its working directory, whatever lies there.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}
"""Variables of every process that starts or joins a cluster."""

LOOPBACK_ENVIRONMENT = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Variables of a cluster of this host alone: Ray keeps a loopback address only where clusters are off, as on a desktop;
otherwise it replaces it by the outward one."""

STARTUP_CONCURRENCY = "worker_maximum_startup_concurrency"
"""Entry of Ray's system configuration: how many workers of a node may start at the same time."""

METRICS_COLLECTION = "enable_metrics_collection"
"""Another entry: whether its processes measure themselves, and its agents answer, on a port, with measurements."""

PIPED_AGENTS = "enable_pipe_based_agent_to_parent_health_check"
"""Another entry: whether the raylet holds a pipe to its agents' standard input, which ends with it."""

NO_AGENT = ("/bin/sh", "-c", "exec cat")
"""A command that does nothing until the raylet ends: it reads the pipe to its standard input."""

NO_PORT = 1
"""In place of an agent's port, and nobody listens there. From an agent without one the raylet waits for a file."""

JOB_CONFIG_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set within a job of a cluster. It may name a runtime environment, which only an agent can make."""

DEPENDENCIES = (
    "asyncio",
    "google.protobuf.descriptor_pb2",
    "google.protobuf.json_format",
    "psutil",
    "requests",
    "yaml",
)
"""Modules that take half of the time of Ray's own import."""

ENTRYPOINT_CHARACTERS_MAX = 80

_RELEASE = re.compile(r"\bReleaseError: (.*)")

_OUR_MODULE = re.compile(r"No module named '(actors|stages|weights)\b|from '(actors|stages|weights)\b")


def set_environment(environment: MutableMapping[str, str], *, is_loopback: bool) -> None:
    """Adds Ray's undocumented variables to an environment; what the user has set stays."""
    for name, value in {**ENVIRONMENT, **(LOOPBACK_ENVIRONMENT if is_loopback else {})}.items():
        environment.setdefault(name, value)


class OwnNode:
    """The processes of a Ray cluster of this host alone: the control store and the raylet.

    What `ray.init` starts beside them serves dashboards, metrics, the autoscaler, runtime environments and the relay of
    workers' output: nothing here uses it, it takes most of a start's time, and it listens on ports, some of which are
    the same for every Ray of a host.
    """

    def __init__(
        self,
        address: str,
        directory: Path,
        resources: Mapping[str, int],
        object_store_bytes: int,
        fork_socket: Path | None = None,
    ) -> None:
        """Starts them at a loopback `address`, with their files below `directory`.

        The workers are forks of the fork server at `fork_socket`, if it is given. Raises Exception itself, as Ray does,
        where they are not up in time.
        """
        from ray._private import services  # noqa: PLC0415 - see the module
        from ray._private.node import Node  # noqa: PLC0415
        from ray._private.parameter import RayParams  # noqa: PLC0415

        class BareNode(Node):
            def start_api_server(self, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
                """Starts no dashboard."""

            def start_raylet(self, *arguments: Any, **options: Any) -> None:
                """Starts the raylet, with our arguments behind Ray's."""
                start = services.start_ray_process
                services.start_ray_process = lambda command, *rest, **named: start(
                    [*command, *raylet_arguments(os.environ)], *rest, **named
                )
                try:
                    super().start_raylet(*arguments, **options)
                finally:
                    services.start_ray_process = start

        system: dict[str, Any] = {
            # As many stages start at once as there are cores: each takes a second of one to import Ray.
            STARTUP_CONCURRENCY: len(os.sched_getaffinity(0)),
            METRICS_COLLECTION: False,
            PIPED_AGENTS: True,
        }
        parameters = RayParams(
            node_ip_address=address,
            num_cpus=1,
            resources=dict(resources),
            object_store_memory=object_store_bytes,
            temp_dir=str(directory),
            include_dashboard=False,
            include_log_monitor=False,  # type: ignore[arg-type] # declared as a string, used as a bool
            no_monitor=True,
            # By default one port for all, which a second Ray of the host then misses.
            dashboard_agent_listen_port=0,
            _system_config=system,
            **({} if fork_socket is None else _forked_workers(fork_socket)),
        )
        self._node = BareNode(parameters, head=True, shutdown_at_exit=False, ray_init_cluster=True)
        self.address: str = self._node.address

    @property
    def is_alive(self) -> bool:
        """Whether all of them run."""
        started = [info for infos in self._node.all_processes.values() for info in infos]
        return bool(started) and all(info.process.poll() is None for info in started)

    def kill(self) -> None:
        """Ends the processes at once, but for the agents, which follow the raylet after some seconds."""
        for started in self._node.all_processes.values():
            for info in started:
                info.process.kill()
        self._node.kill_all_processes(check_alive=False)


def raylet_arguments(environment: Mapping[str, str]) -> list[str]:
    """Returns arguments of a raylet that has no agents; none where the environment may want a runtime environment.

    The raylet insists on commands for them, and ends when they do. Each takes a second of a core to be imported, and
    the raylet waits for both. What they serve is metrics, logs and jobs of dashboards, and runtime environments.
    """
    if JOB_CONFIG_VARIABLE in environment:
        return []
    command = subprocess.list2cmdline(NO_AGENT)
    ports = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
    return [
        *(f"--{name}_command={command}" for name in ("dashboard_agent", "runtime_env_agent")),
        *(f"--{name}={NO_PORT}" for name in ports),
    ]


def _forked_workers(fork_socket: Path) -> dict[str, Any]:
    """Parameters of a node whose workers are forks."""
    variables = {fork_client.SOCKET_VARIABLE: str(fork_socket), fork_client.SCRIPT_VARIABLE: worker_script()}
    return {"worker_path": fork_client.__file__, "env_vars": variables}


def worker_script() -> str:
    """Returns the path of the program that the raylet runs as a worker."""
    import ray  # noqa: PLC0415 - see the module

    return str(Path(ray.__file__).parent / "_private" / "workers" / "default_worker.py")


def import_dependencies() -> None:
    """Imports what Ray itself imports, and not Ray, which reads its environment: a fork is to do so in its own."""
    for name in DEPENDENCIES:
        importlib.import_module(name)


def current_cluster() -> str:
    """Returns what "auto" stands for: the cluster that `ray start` began last on this host, else the only one there is.

    Raises ClusterError where there is none, or more than one.
    """
    from ray._private import services, utils  # noqa: PLC0415 - see the module

    if address := utils.read_ray_address():
        return address
    running = sorted(services.find_gcs_addresses())  # type: ignore[no-untyped-call]
    if len(running) == 1:
        return str(running[0])
    what = f"{len(running)} Ray clusters run on this host" if running else "No Ray cluster runs on this host"
    raise ClusterError(f"{what}: give HOST:PORT of one in place of 'auto', or no address.")


def stop_error_listener() -> None:
    """Ends the thread in which a driver waits for error messages of the cluster, to print them.

    Without Ray's head this thread polls in a loop that never waits, and takes a core, and the interpreter, from what
    still serves. What it prints is of no use here: the pipeline finds out by itself what became of its stages. Ray has
    no setting for it; its own `disconnect` ends it in the same way, and may do so again.
    """
    from ray._private.worker import global_worker  # noqa: PLC0415 - see the module

    global_worker.threads_stopped.set()
    global_worker.gcs_error_subscriber.close()  # type: ignore[attr-defined] # set as it connects
    global_worker.listener_thread.join()  # type: ignore[attr-defined]


def actor_holders(class_name: str) -> str:
    """Returns a sentence that names the processes whose actors of this class run in the cluster, and their hosts.

    It is empty where there are none. Spares are counted with stages, as Ray does not distinguish them.
    """
    from ray._private import state  # noqa: PLC0415 - see the module

    actors = Counter(
        (actor["JobID"], actor["Address"]["IPAddress"])
        for actor in state.state.actor_table(None, actor_state_name="ALIVE").values()
        if actor["ActorClassName"] == class_name
    )
    if not actors:
        return ""
    jobs = {job["JobID"]: job for job in state.state.job_table()}  # type: ignore[no-untyped-call]
    held = (f"{count} on {address} by {_process(jobs.get(job))}" for (job, address), count in sorted(actors.items()))
    return f" These processes of stages run: {', '.join(held)}."


def _process(job: dict[str, Any] | None) -> str:
    if job is None:
        return "a job that is gone"
    entrypoint = job["Entrypoint"]
    if len(entrypoint) > ENTRYPOINT_CHARACTERS_MAX:
        entrypoint = entrypoint[:ENTRYPOINT_CHARACTERS_MAX] + "..."
    return f"process {job['DriverPid']} on {job['DriverIPAddress']} ({entrypoint})"


def setup_error(stage: int, host: str, traceback: str) -> GalaxylineError:
    """Returns the error for an actor whose constructor raised, or whose class could not be imported.

    Ray passes neither the exception nor its class on, but only the text of the `traceback`; so this is the one place
    where the kind of a failure is read from a text.
    """
    cause = last_line(traceback)
    if refused := _RELEASE.search(cause):
        return ReleaseError(refused[1])
    if _OUR_MODULE.search(cause):
        what = f"has no galaxyline that Ray's processes can use ({cause})"
        return ReleaseError(release_sentence(host, what, own_release()))
    return StartError(f"Stage {stage} on {host} could not be set up: {cause}")


def last_line(traceback: str) -> str:
    """Returns the last line of a traceback that is not empty."""
    return next((line.strip() for line in reversed(traceback.splitlines()) if line.strip()), "no cause was given")
