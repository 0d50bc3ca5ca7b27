"""`galaxyline status`, and the views it shows, against servers that say what the test wants."""

import io
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest
from click.testing import Result
from fastapi import FastAPI
from rich.console import Console

from api.cli.status import follow
from api.cli.tables import pipeline_text
from api.errors import EngineError, NoServerError
from api.messages.engine import DraftCounts, EnginePhase, EngineState, failed_state
from api.messages.pipeline_view import DraftView, EngineView, PipelineView, ReplicaView, StageRoster, ViewPhase, total
from api.server.app import create_app
from api.server.monitoring import STOPPING, add_monitoring_routes
from tests.support.api_server import MODEL, AppServer
from tests.support.command_line import run
from tests.support.reporting_engine import DRAFTS, SPECS, ReportingEngine, at_work, progress, views


def replica_view(phase: EnginePhase, detail: str = "") -> ReplicaView:
    return ReplicaView(replica=0, phase=phase, detail=detail, engine=None)


@contextmanager
def serving(*engines: ReportingEngine) -> Iterator[str]:
    app = create_app(MODEL, engines[0])
    add_monitoring_routes(app, MODEL.name, engines)
    with serving_any(app) as url:
        yield url


@contextmanager
def serving_any(app: FastAPI) -> Iterator[str]:
    server = AppServer(app)
    server.start()
    try:
        yield server.url
    finally:
        server.stop()


def status(*arguments: str) -> Result:
    return run("status", *arguments)


def refused(*arguments: str, code: int) -> str:
    result = status(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    # The server that is asked runs in this process too, and logs.
    [line] = [said for said in result.stderr.splitlines() if said.startswith("Error: ")]
    assert "Traceback" not in result.stderr
    return line


def test_a_stage_is_shown_by_what_is_known_of_it() -> None:
    roster = StageRoster(SPECS)
    assert [(view.state, view.host, view.rows) for view in views(roster)] == [("placing", None, None)] * 2
    assert roster.hosts == ["", ""]
    roster.record_progress(progress(0, "starting"))
    roster.record_progress(progress(1, "starting"))
    roster.record_progress(progress(1, "loading", done=1))
    first, second = views(roster)
    assert (first.state, first.host, first.rows, first.layers_done) == ("starting", "host-0", [0], 0)
    assert (second.state, second.layers_done, second.pid, second.resident_bytes) == ("loading", 1, None, None)
    assert roster.hosts == ["host-0", "host-1"]
    running, dead = at_work()
    assert (running.state, running.step_id, running.step_seconds, running.steps_done) == ("running", 12, 0.34, 7)
    assert (running.pid, running.resident_bytes, running.detail) == (1000, 3 << 20, "")
    assert (running.first_layer, running.end_layer, running.layers_done) == (0, 4, 4)
    assert (dead.state, dead.pid, dead.resident_bytes) == ("dead", None, None)
    assert (dead.busy_share, dead.kv_cache_blocks_used) == (0.25, 30)


def test_a_stage_that_starts_again_was_restarted() -> None:
    roster = StageRoster(SPECS)
    for phase in ("starting", "loading", "ready", "starting", "ready", "starting"):
        roster.record_progress(progress(1, phase))
    assert [view.restarts for view in views(roster)] == [0, 2]


def test_the_table_goes_out_once_where_there_is_no_terminal() -> None:
    with serving(ReportingEngine(at_work())) as url:
        result = status("--url", f"{url}/")
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    assert shown.startswith("small: ready 5 requests running, 2 waiting, 6 preemptions; 2 of 4 microbatches in flight;")
    assert "5 of 96 slots, 30 of 100 KV blocks; epoch 3, engine pid 4711" in shown
    assert "prefix cache: 1,234 blocks, 87% of prompt tokens found; 1.0 MiB in host memory, 1.0 GiB on disk" in shown
    assert "0 host-0 0 0-3 running, step 12 for 0.3 s 7 0% 0 3 MiB 1000" in shown
    assert "dead: its process died" in shown.replace(" 7 25% 0 - - ", " ")
    assert "/srv" not in shown


def test_json_is_the_servers_own() -> None:
    with serving(ReportingEngine(at_work())) as url:
        result = status("--url", url, "--json")
    assert result.exit_code == 0
    view = json.loads(result.stdout)
    assert (view["model"], view["phase"], view["engine"]["epoch"]) == ("small", "ready", 3)
    assert [stage["state"] for stage in view["stages"]] == ["running", "dead"]
    assert [stage["host_tier_bytes"] for stage in view["stages"]] == [0, 1 << 20]
    names = ("prefix_cache_blocks", "prefix_cache_queries", "prefix_cache_hits", "recomputed_tokens")
    assert [view["engine"][name] for name in names] == [1234, 2000, 1740, 50]
    assert (view["engine"]["host_tier_bytes"], view["engine"]["disk_tier_bytes"]) == (1 << 20, 1 << 30)
    assert msgspec.json.decode(result.stdout, type=PipelineView).stages[0].rows == [0]


def test_what_drafts_came_to_is_shown_where_they_are_asked_for() -> None:
    engine, other = ReportingEngine(at_work()), ReportingEngine(at_work())
    with serving(engine) as url:
        without = status("--url", url).stdout
        engine.drafts = DraftCounts(num_speculative_tokens=1)
        before = status("--url", url).stdout
        engine.drafts = DRAFTS
        after = status("--url", url).stdout
        view = json.loads(status("--url", url, "--json").stdout)
    assert "drafts" not in without
    assert "drafts: off, up to 1 token\n" in before
    assert "drafts: on, up to 2 tokens; 75% of 2,000 accepted, 2.50 tokens a step\n" in after
    assert view["engine"]["drafts"] == {
        **msgspec.structs.asdict(DRAFTS),
        "acceptance_rate": 0.75,
        "tokens_per_draft": 2.5,
    }
    other.drafts = DraftCounts(num_speculative_tokens=2, accepted_per_position=[0, 0])
    with serving(engine, other) as url:
        view = json.loads(status("--url", url, "--json").stdout)
    assert view["engine"]["drafts"] == view["replicas"][0]["engine"]["drafts"]
    assert view["replicas"][1]["engine"]["drafts"]["acceptance_rate"] is None


def test_a_loading_and_a_failed_server_are_shown() -> None:
    roster = StageRoster(SPECS)
    roster.record_progress(progress(0, "loading", done=3))
    engine = ReportingEngine(views(roster))
    engine.state = EngineState(phase="loading", progress=progress(0, "loading", done=3))
    with serving(engine) as url:
        loading = status("--url", url).stdout
        engine.state = failed_state(EngineError.for_clients("Stage 1 on host-1 failed at step 7: its process died."))
        engine.failure = EngineError("The engine is gone.")
        failed = status("--url", url).stdout
    assert loading.startswith("small: loading. Stage 0 on host-0: loading, 3 of 4 layers\n")
    assert "loading, 3 of 4 layers" in loading.partition("\n")[2]
    assert "placing" in loading
    assert failed == "small: failed. Stage 1 on host-1 failed at step 7: its process died.\n"


def failed_engine() -> ReportingEngine:
    engine = ReportingEngine([])
    engine.state = failed_state(EngineError.for_clients("Stage 1 on host-1 failed at step 7: its process died."))
    engine.failure = EngineError("The engine is gone.")
    return engine


def test_every_replica_is_shown_also_one_that_failed() -> None:
    with serving(ReportingEngine(at_work()), failed_engine(), ReportingEngine(at_work())) as url:
        shown = status("--url", url).stdout
    lines = shown.splitlines()
    assert lines[:2] == ["small: ready", "replica 0: ready"]
    assert "replica 1: failed. Stage 1 on host-1 failed at step 7: its process died." in lines
    assert shown.count("5 requests running, 2 waiting") == 2
    rows = [line.split()[:3] for line in lines if "host-" in line and "layers" not in line and "failed" not in line]
    assert rows == [["0", "0", "host-0"], ["0", "1", "host-1"], ["2", "0", "host-0"], ["2", "1", "host-1"]]


def test_json_has_the_sum_over_all_replicas_and_each_by_itself() -> None:
    with serving(ReportingEngine(at_work()), failed_engine(), ReportingEngine(at_work())) as url:
        view = json.loads(status("--url", url, "--json").stdout)
    assert view["phase"] == "ready"
    assert view["detail"] == "Replica 1: Stage 1 on host-1 failed at step 7: its process died."
    assert (view["engine"]["requests_running"], view["engine"]["slots"], view["engine"]["pid"]) == (10, 192, None)
    assert [replica["phase"] for replica in view["replicas"]] == ["ready", "failed", "ready"]
    assert [replica["engine"] and replica["engine"]["pid"] for replica in view["replicas"]] == [4711, None, 4711]
    assert [(stage["replica"], stage["stage"]) for stage in view["stages"]] == [(0, 0), (0, 1), (2, 0), (2, 1)]


def test_a_replica_that_does_not_answer_hides_no_other() -> None:
    silent = ReportingEngine([])
    silent.failure = EngineError.for_clients("The engine did not answer within 5 s.")
    with serving(silent, ReportingEngine(at_work())) as url:
        view = json.loads(status("--url", url, "--json").stdout)
    assert [replica["detail"] for replica in view["replicas"]] == ["The engine did not answer within 5 s.", ""]
    assert (view["phase"], view["engine"]["pid"], len(view["stages"])) == ("ready", 4711, 2)


def test_books_of_engines_add_up() -> None:
    numbers = [name for name in EngineView.__struct_fields__ if name not in {"pid", "epoch", "drafts"}]
    books = [
        EngineView(pid=1, epoch=2, drafts=None, **{name: factor * place for place, name in enumerate(numbers)})
        for factor in (1, 10, 100)
    ]
    added = total(books)
    assert added is not None
    assert (added.pid, added.epoch) == (None, None)
    assert [getattr(added, name) for name in numbers] == [111 * place for place in range(len(numbers))]
    assert added.drafts is None
    assert total(books[:1]) == books[0]
    assert total([]) is None


def test_what_drafts_of_engines_came_to_adds_up() -> None:
    views = [
        DraftView.of(
            num_speculative_tokens=2,
            drafts=10 * engine,
            draft_tokens=20 * engine,
            accepted_tokens=12 * engine,
            accepted_per_position=[9 * engine, 3 * engine],
            are_on=engine == 1,
        )
        for engine in (1, 2)
    ]
    numbers = [name for name in EngineView.__struct_fields__ if name not in {"pid", "epoch", "drafts"}]
    added = total([EngineView(pid=1, epoch=2, **dict.fromkeys(numbers, 0), drafts=view) for view in views])
    assert added is not None
    assert added.drafts == DraftView(
        num_speculative_tokens=2,
        drafts=30,
        draft_tokens=60,
        accepted_tokens=36,
        accepted_per_position=[27, 9],
        are_on=True,
        acceptance_rate=0.6,
        tokens_per_draft=2.2,
    )


def test_where_no_server_answers_it_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    assert refused("--url", url, code=1) == (
        f"Error: No server answers at {url}: start one, or give its address with --url."
    )


@pytest.mark.parametrize("shape", ["{0}", "http://{0}", "http://{0}/", "http://{0}/v1", "{0}/v1/"])
def test_an_address_as_people_have_it_is_followed(shape: str) -> None:
    with serving(ReportingEngine(at_work())) as url:
        result = status("--url", shape.format(url.removeprefix("http://")), "--json")
    assert (result.exit_code, json.loads(result.stdout)["model"]) == (0, "small")


def test_a_server_that_speaks_no_tls_is_told_from_none() -> None:
    with serving(ReportingEngine(at_work())) as url:
        secure = url.replace("http:", "https:")
        error = refused("--url", secure, code=1)
    assert error == f"Error: What answers at {secure} does not speak TLS: write http:// in place of https://."


def test_a_server_that_speaks_no_http_is_told_from_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"\x15\x03\x01\x00\x02\x02\x46")

        thread = threading.Thread(target=answer)
        thread.start()
        error = refused("--url", url, code=1)
        thread.join()
    assert error == f"Error: What answers at {url} does not speak HTTP. If it serves HTTPS, write https://."


def test_a_key_that_cannot_be_sent_is_one_sentence() -> None:
    assert refused("--api-key", "clé", code=2) == "Error: An API key must be printable ASCII: this one cannot be sent."


@pytest.mark.parametrize("columns", [30, 60, 80])
def test_no_figure_is_cut_where_the_console_is_narrow(columns: int) -> None:
    with serving(ReportingEngine(at_work())) as url:
        shown = run("status", "--url", url, COLUMNS=str(columns)).stdout
    assert max(map(len, shown.splitlines())) <= columns
    assert "…" not in shown
    for part in (
        "running, step",
        "step 12 for 0.3 s" if columns > 30 else "0.3 s",
        "host-0",
        "3 MiB",
        "1000",
        "25%",
        "dead: its",
    ):
        assert part in shown


def test_a_server_that_is_stopped_on_purpose_says_so() -> None:
    draining, closed = ReportingEngine(at_work()), failed_engine()
    app = create_app(MODEL, draining)
    add_monitoring_routes(app, MODEL.name, [draining, closed])
    setattr(app.state, STOPPING, True)
    with serving_any(app) as url:
        shown = status("--url", url).stdout.splitlines()
        draining.failure = EngineError.for_clients("The engine was closed.")
        view = json.loads(status("--url", url, "--json").stdout)
    assert (shown[0], "replica 1: stopping" in shown) == ("small: stopping", True)
    assert (view["phase"], view["detail"], view["engine"]) == ("stopping", "", None)


@pytest.mark.parametrize("phase", ["stopping", "ready"])
def test_following_ends_well_where_the_server_was_to_stop(phase: ViewPhase) -> None:
    console = Console(force_terminal=True, width=120, file=io.StringIO())
    last = PipelineView(model="small", phase=phase, detail="", engine=None, replicas=[replica_view("ready")], stages=[])
    views = iter([last])

    def read() -> PipelineView:
        try:
            return next(views)
        except StopIteration:
            raise NoServerError("No server answers.") from None

    if phase == "ready":
        with pytest.raises(NoServerError):
            follow(console, read, lambda _: None)
    else:
        follow(console, read, lambda _: None)
        assert "The server has stopped." in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("url", ["http://[", "http://127.0.0.1:port", "http://", "ftp://host"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    assert refused("--url", url, "--json", code=2) == (
        f"Error: --url {url!r} is not an HTTP address: write it like http://127.0.0.1:8000."
    )


@pytest.mark.parametrize("route", [None, {"model": 5}])
def test_another_server_is_told_from_ours(route: object) -> None:
    app = FastAPI()
    if route is not None:
        app.add_api_route("/pipeline", lambda: route)
    with serving_any(app) as url:
        error = refused("--url", url, code=1)
    assert error == f"Error: What answers at {url} is not a galaxyline server: give the address of one with --url."


def test_an_engine_that_does_not_answer_is_the_servers_own_sentence() -> None:
    engine = ReportingEngine([])
    engine.failure = EngineError.for_clients("The engine did not answer within 5 s.")
    with serving(engine) as url:
        assert (
            refused("--url", url, code=1)
            == f"Error: The server at {url} answers: The engine did not answer within 5 s."
        )


def test_a_terminal_follows_until_ctrl_c() -> None:
    console = Console(force_terminal=True, width=120, file=io.StringIO())
    engine_views = [at_work() for _ in range(3)]
    seen = iter(
        PipelineView(
            model="small",
            phase="ready",
            detail="",
            engine=None,
            replicas=[replica_view("ready")],
            stages=[msgspec.structs.replace(stage, steps_done=looks) for stage in stages],
        )
        for looks, stages in enumerate(engine_views)
    )
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            raise KeyboardInterrupt

    follow(console, lambda: next(seen), sleep)
    assert slept == [1.0] * 3
    assert next(seen, None) is None


def test_a_view_without_an_engine_is_one_line() -> None:
    console = Console(width=120, file=io.StringIO())
    view = PipelineView(
        model="small",
        phase="failed",
        detail="[it] broke",
        engine=None,
        replicas=[replica_view("failed", "[it] broke")],
        stages=[],
    )
    console.print(pipeline_text(view))
    assert console.file.getvalue() == "small: failed. [it] broke\n"  # type: ignore[attr-defined]
