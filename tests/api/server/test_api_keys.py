"""API keys: where they come from, which paths need them, and that they are never shown."""

import os
from pathlib import Path

import httpx
import pytest
from structlog.testing import capture_logs

from api.cli.status import read_view
from api.errors import OptionError
from api.server.app import create_app
from api.server.monitoring import add_monitoring_routes
from api.settings.server import KEY_VARIABLES, ApiKeys, FrontSettings, ServeSettings
from tests.support.api_client import error_of
from tests.support.api_server import MODEL, AppServer, endless_text
from tests.support.command_line import run
from tests.support.fake_engine import FakeEngine
from tests.support.reporting_engine import ReportingEngine, at_work

KEYS = ["first-secret", "second secret"]
ENVIRONMENT = dict(zip(KEY_VARIABLES, ("ours", "vllms"), strict=True))


def client(engine: FakeEngine) -> httpx.AsyncClient:
    app = create_app(MODEL, engine, front=FrontSettings(api_keys=ApiKeys(KEYS)))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
async def test_each_key_opens_everything(key: str, scheme: str) -> None:
    async with client(FakeEngine(endless_text)) as opened:
        headers = {"authorization": f"{scheme} {key}"}
        answer = await opened.post("/v1/completions", json={"prompt": "hello"}, headers=headers)
        assert answer.status_code == 200
        assert (await opened.get("/openapi.json", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Bearer first-secre", f"Basic {KEYS[0]}", KEYS[0]]
)
async def test_without_a_key_only_health_is_told(authorization: str | None) -> None:
    engine = FakeEngine(endless_text)
    headers = {} if authorization is None else {"authorization": authorization}
    with capture_logs() as logs:
        async with client(engine) as opened:
            for path in ("/health", "/live", "/ready", "/ping"):
                assert (await opened.get(path, headers=headers)).status_code == 200
            for path in ("/v1/models", "/openapi.json", "/version", "/metrics", "/nowhere", "//health", "/health/"):
                refused = await opened.get(path, headers=headers)
                assert error_of(refused, 401)["type"] == "AuthenticationError"
                assert refused.headers["www-authenticate"] == "Bearer"
            error_of(await opened.post("/v1/completions", json={"prompt": "hello"}, headers=headers), 401)
    assert not engine.streams
    assert not any(key in str(logs) for key in KEYS)


async def test_a_narrower_scope_leaves_monitoring_open_as_vllm_does() -> None:
    app = create_app(MODEL, FakeEngine(endless_text), front=FrontSettings(api_keys=ApiKeys(KEYS, "v1")))
    add_monitoring_routes(app, MODEL.name, [ReportingEngine(at_work())])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as opened:
        for path in ("/v1/models", "/v1/completions", "/v1", "/v1/nowhere"):
            error_of(await opened.get(path), 401)
        error_of(await opened.post("/reset_prefix_cache"), 401)
        key = {"x-api-key": KEYS[0]}
        assert (await opened.post("/reset_prefix_cache", headers=key)).status_code == 200
        for path in ("/metrics", "/pipeline", "/version", "/load", "/tokenizer_info", "/openapi.json"):
            assert (await opened.get(path)).status_code == 200
        paths = (await opened.get("/openapi.json")).json()["paths"]
    assert paths["/v1/completions"]["post"]["security"] == [{"API key": []}, {"API key of Anthropic's clients": []}]
    assert paths["/metrics"]["get"]["security"] == []


async def test_the_description_says_what_needs_a_key() -> None:
    async with client(FakeEngine(endless_text)) as opened:
        document = (await opened.get("/openapi.json", headers={"authorization": f"Bearer {KEYS[0]}"})).json()
    schemes = document["components"]["securitySchemes"].values()
    assert [scheme["type"] for scheme in schemes] == ["http", "apiKey"]
    guarded = {path for path, methods in document["paths"].items() if any(m["security"] for m in methods.values())}
    assert {"/health", "/live", "/ready", "/ping"} == document["paths"].keys() - guarded


def test_keys_come_from_flags_and_file_or_else_from_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("\n  in-file \n\nalso in file\n")
    both = ApiKeys.read(["flag"], file, ENVIRONMENT)
    assert both is not None
    assert [both.accepts(key) for key in (b"flag", b"in-file", b"also in file", b"ours", b"")] == [True] * 3 + [
        False
    ] * 2
    ours = ApiKeys.read([], None, ENVIRONMENT)
    vllms = ApiKeys.read([], None, {KEY_VARIABLES[0]: "", KEY_VARIABLES[1]: "vllms"})
    assert ours is not None
    assert vllms is not None
    assert [keys.accepts(key) for keys in (ours, vllms) for key in (b"ours", b"vllms")] == [True, False, False, True]
    assert ApiKeys.read([], None, {}) is None


def test_what_is_no_key_is_refused_without_showing_it(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "large").write_text("key\n" * 300_000)
    for file in ("empty", "binary", "large", "missing"):
        with pytest.raises(OptionError, match=file):
            ApiKeys.read([], tmp_path / file, ENVIRONMENT)
    for key in ("", " ", "hidden ", "hidden\n", "hidd\xe9n"):
        with pytest.raises(OptionError) as refusal:
            ApiKeys.read([key], None, {})
        assert "hidd" not in str(refusal.value)


def test_serve_takes_them_out_of_the_environment_and_shows_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[ServeSettings] = []

    async def record(settings: ServeSettings) -> None:
        given.append(settings)

    monkeypatch.setattr("api.server.serve.serve", record)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with capture_logs() as logs:
        assert run("serve", "--api-key", KEYS[0], "--api-key", KEYS[1]).exit_code == 0
    [settings] = given
    assert settings.front.api_keys is not None
    assert settings.front.api_keys.accepts(KEYS[1].encode())
    assert not any(key in f"{settings} {logs}" for key in (*KEYS, *ENVIRONMENT.values()))
    assert not any(name in os.environ for name in KEY_VARIABLES)


def test_status_brings_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ReportingEngine(at_work())
    app = create_app(MODEL, engine, front=FrontSettings(api_keys=ApiKeys(KEYS)))
    add_monitoring_routes(app, MODEL.name, [engine])
    server = AppServer(app)
    server.start()
    try:
        assert read_view(server.url, KEYS[0]).model == MODEL.name
        assert run("status", "--url", server.url, "--json", "--api-key", KEYS[1]).exit_code == 0
        without = run("status", "--url", server.url, "--json")
        assert (without.exit_code, "wants a key: give one of its keys with --api-key" in without.stderr) == (2, True)
        wrong = run("status", "--url", server.url, "--json", "--api-key", "wrong")
        assert (wrong.exit_code, "does not know this key: give one of its keys with" in wrong.stderr) == (2, True)
        monkeypatch.setenv(KEY_VARIABLES[1], KEYS[0])
        assert run("status", "--url", server.url, "--json").exit_code == 0
    finally:
        server.stop()
