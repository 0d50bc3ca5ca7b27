"""HTTPS with a certificate that is made here, by openssl."""

import asyncio
import contextlib
import ssl
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.client import replicas
from api.errors import OptionError
from api.server import serve
from api.settings.engine import EngineSettings
from api.settings.server import FrontSettings, ServeSettings, TlsFiles
from benchmarks.support.ports import free_port
from tests.support.api_server import DEADLINE_S, endless_text
from tests.support.fake_engine import SAMPLE, FakeEngineClient


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a self-signed cert.pem and its key.pem for 127.0.0.1, and both in both.pem."""
    folder = tmp_path_factory.mktemp("tls")
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2", "-nodes"]
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(["openssl", "req", "-x509", *key, *subject], cwd=folder, check=True, capture_output=True)
    (folder / "both.pem").write_text((folder / "cert.pem").read_text() + (folder / "key.pem").read_text())
    return folder


Ask = Callable[[httpx.AsyncClient, int], Awaitable[Any]]


async def complete(client: httpx.AsyncClient, _: int) -> int:
    """The status of a completion."""
    return (await client.post("/v1/completions", json={"prompt": "hello", "max_tokens": 3})).status_code


async def answer(
    folder: Path, tmp_path: Path, front: FrontSettings, brings_certificate: bool, ask: Ask = complete
) -> Any:
    """Returns what `ask` does, which gets a client of a server over HTTPS and its port."""
    port = free_port()
    settings = ServeSettings(
        engine=EngineSettings.of(cache_dir=tmp_path, spare=False),
        source=SAMPLE,
        host="127.0.0.1",
        port=port,
        shutdown_timeout_s=0.2,
        front=front,
    )
    context = ssl.create_default_context(cafile=str(folder / "cert.pem"))
    if brings_certificate:
        context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    serving = asyncio.create_task(serve.serve(settings))
    try:
        async with httpx.AsyncClient(
            base_url=f"https://127.0.0.1:{port}", verify=context, timeout=DEADLINE_S
        ) as client:
            deadline = asyncio.get_running_loop().time() + DEADLINE_S
            while asyncio.get_running_loop().time() < deadline:
                with contextlib.suppress(httpx.ConnectError):
                    if (await client.get("/health")).status_code == 200:
                        break
                await asyncio.sleep(0.01)
            return await ask(client, port)
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngineClient:
    fake = FakeEngineClient(endless_text)
    fake.loaded.set()
    monkeypatch.setattr(replicas, "EngineClient", fake)
    return fake


@pytest.mark.parametrize("names", [("cert.pem", "key.pem"), ("both.pem", None)])
async def test_completions_over_https(
    names: tuple[str, str | None],
    folder: Path,
    engine: FakeEngineClient,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    certificate, key = names
    tls = TlsFiles.of(folder / certificate, None if key is None else folder / key, None)
    assert await answer(folder, tmp_path, FrontSettings(tls=tls), brings_certificate=False) == 200
    assert "curl https://127.0.0.1:" in capsys.readouterr().out
    assert engine.closed


async def test_clients_without_a_certificate_are_kept_out(
    folder: Path, engine: FakeEngineClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = TlsFiles.of(folder / "cert.pem", folder / "key.pem", folder / "cert.pem")
    front = FrontSettings(tls=tls)
    assert await answer(folder, tmp_path, front, brings_certificate=True) == 200
    monkeypatch.setattr("tests.api.server.test_tls.DEADLINE_S", 0.5)
    with pytest.raises(httpx.TransportError):
        await answer(folder, tmp_path, front, brings_certificate=False)


async def test_a_handshake_has_no_longer_than_a_request(folder: Path, engine: FakeEngineClient, tmp_path: Path) -> None:
    """The loop itself would wait for a minute."""

    async def begin_only(_: httpx.AsyncClient, port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"\x16\x03\x01")
        try:
            return await asyncio.wait_for(reader.read(), DEADLINE_S)
        except ConnectionResetError:
            return b""
        finally:
            writer.close()

    tls = TlsFiles.of(folder / "cert.pem", folder / "key.pem", None)
    front = FrontSettings(tls=tls, client_timeout_s=0.5)
    assert await answer(folder, tmp_path, front, brings_certificate=False, ask=begin_only) == b""


def test_files_that_make_no_identity_are_refused(folder: Path) -> None:
    for certificate, key, authorities in (
        (None, "key.pem", None),
        (None, None, "cert.pem"),
        ("cert.pem", None, None),
        ("missing.pem", None, None),
        ("key.pem", "key.pem", None),
        ("cert.pem", "key.pem", "key.pem"),
    ):
        files = [None if name is None else folder / name for name in (certificate, key, authorities)]
        with pytest.raises(OptionError, match="--ssl-certfile"):
            TlsFiles.of(*files)
    assert TlsFiles.of(None, None, None) is None
