"""A stage server that leaves its links and is joined anew."""

import asyncio
import select
import socket
import tempfile

import msgspec
import pytest

from actors.errors import LinkError
from actors.sockets.listener import HostListener, UnixAddress
from actors.stage.server import StageServer
from actors.stage.setup import stage_name
from tests.support.links import Ear
from tests.support.loops import on_uvloop
from tests.support.runners import EchoRunner
from tests.support.stage_bench import (
    IDENTITY,
    SECONDS,
    Bench,
    Raising,
    Waiting,
    bench,
    join,
    reset,
    spec,
    step,
    untimed,
)

AGAIN = msgspec.structs.replace(IDENTITY, epoch=5, secret=b"another")


async def serves(around: Bench, first: int) -> None:
    """Fails unless the steps of the new epoch, and they alone, come through."""
    for step_id in (first, first + 1):
        await around.send(step_id, epoch=5)
        assert untimed((await around.downstream_ear.next()).message) == step(step_id, epoch=5)
    around.upstream.close()
    around.downstream.close()


@on_uvloop
async def test_a_stage_that_failed_serves_again_without_what_was_on_its_way() -> None:
    with tempfile.TemporaryDirectory(prefix="again-") as parent:
        async with bench(IDENTITY, Raising(spec(IDENTITY))) as around:
            for step_id in (2, 3, 4):
                await around.send(step_id)
            assert (await around.failure()).step_id == 2
            await reset(around.server, AGAIN)
            health = around.server.health()
            assert (health.state, health.detail) == ("ready", "")
            assert (health.received_step, health.passed_step) == (None, None)
            await serves(await join(around, AGAIN, parent), 10)
            assert (around.server.health().received_step, around.server.health().passed_step) == (11, 11)


@on_uvloop
async def test_a_stage_at_work_ends_its_step_first_and_nobody_gets_it() -> None:
    waiting = Waiting(spec(IDENTITY))
    with tempfile.TemporaryDirectory(prefix="again-") as parent:
        async with bench(IDENTITY, waiting) as around:
            for step_id in (7, 8):
                await around.send(step_id)
            assert await asyncio.to_thread(waiting.began.wait, SECONDS)
            resetting = asyncio.ensure_future(reset(around.server, AGAIN))
            assert "closed the connection" in await around.upstream_ear.cause()
            assert not resetting.done()
            waiting.go_on.set()
            await resetting
            again = await join(around, AGAIN, parent)
            await serves(again, 10)
            assert around.downstream_ear.arrivals.empty()
            assert around.server.health().steps_done == 3


@on_uvloop
async def test_a_loss_of_a_former_link_harms_nobody() -> None:
    with tempfile.TemporaryDirectory(prefix="again-") as parent:
        async with bench(IDENTITY, Waiting(spec(IDENTITY))) as around:
            await reset(around.server, AGAIN)
            again = await join(around, AGAIN, parent)
            around.upstream.close()
            around.downstream.close()
            assert around.server.health().state == "ready"
            again.upstream.close()
            assert "lost the link from stage 0" in (await again.failure()).cause


@on_uvloop
async def test_a_join_that_comes_too_late_is_given_up() -> None:
    with tempfile.TemporaryDirectory(prefix="again-") as parent:
        async with bench(IDENTITY, EchoRunner(spec(IDENTITY))) as around:
            late = UnixAddress(f"{parent}/late.sock")
            with socket.socket(socket.AF_UNIX) as listening:
                listening.setblocking(False)
                listening.bind(late.path)
                listening.listen()
                joining = around.server.connect(late)
                assert (await asyncio.to_thread(select.select, [listening], [], [], SECONDS))[0]
                await reset(around.server, AGAIN)
                again = await join(around, AGAIN, parent)
                down = msgspec.structs.replace(IDENTITY.downstream_terms(), name=stage_name(2), peer=stage_name(1))
                HostListener(listening, late, down, ear := Ear())
                with pytest.raises(LinkError, match="left its links while it was being joined"):
                    await asyncio.wait_for(asyncio.wrap_future(joining), SECONDS)
                assert "closed the connection" in await ear.cause()
                await serves(again, 10)


async def test_a_stage_without_weights_or_that_is_closed_cannot_be_joined_anew() -> None:
    server = StageServer(IDENTITY)
    with pytest.raises(LinkError, match="not there to be joined anew"):
        await reset(server, AGAIN)
    await asyncio.to_thread(server.close)
    with pytest.raises(LinkError, match="not there to be joined anew"):
        await reset(server, AGAIN)
