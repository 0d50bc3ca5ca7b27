"""A server whose stages' sockets stay open while a gate is shut: `python -m tests.support.gated_serve serve ...`.

GATE in the environment is a directory. While it has the file SHUT, stages that listen are not joined; the addresses
they listen at in an epoch, and the hellos that could be overheard by then, are in the file `EPOCH.json`.
"""

import asyncio
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from actors.cluster.environment import prepare_environment
from actors.options import PipelineOptions
from actors.pipeline import Pipeline
from actors.sockets.frames import Hello, encode
from actors.sockets.listener import Address
from actors.stage.health import StageProgress
from api.cli import group
from api.engine.options import EngineOptions
from api.settings.engine import EngineSettings
from api.text.model_source import ModelSource
from tests import ROOT
from weights.model_config import UNCHANGED, ConfigChanges, ModelConfig

VARIABLE = "GATE"
SHUT = "shut"
PROGRAM = ("tests.support.gated_serve",)


class Overheard(msgspec.Struct, frozen=True):
    """The sockets that stages listen at, in order, and the hello in hexadecimal that belongs to each, in `epoch`."""

    epoch: int
    addresses: list[str]
    hellos: list[str]


def environment(gate: Path) -> dict[str, str]:
    """Returns the environment of a server behind that gate, whose engine has to find this package."""
    return {VARIABLE: str(gate), "PYTHONPATH": str(ROOT)}


def until_open(gate: Path) -> None:
    while (gate / SHUT).exists():
        time.sleep(0.01)


async def start(options: PipelineOptions, on_progress: Callable[[StageProgress], None]) -> Pipeline:
    """Starts a pipeline like any other, behind the gate; called in the engine's process."""
    prepare_environment(options.cluster.ray_address)
    from actors.stage.group import StageGroup  # noqa: PLC0415 - imports Ray, which reads what `prepare_environment` has set

    listen = StageGroup.listen

    async def gated(self: StageGroup, addresses: Sequence[Address], deadline: float) -> list[Address]:
        bound = await listen(self, addresses, deadline)
        gate = Path(os.environ[VARIABLE])
        identities = [setup.identity for setup in self._setups]
        hellos = []
        for identity in identities:
            terms = identity.upstream_terms()
            hello = Hello(
                secret=terms.secret,
                sender=terms.peer,
                receiver=terms.name,
                dtype=terms.dtype,
                bytes_per_token=terms.bytes_per_token,
                credits=0,
            )
            hellos.append(encode(hello, terms.epoch).hex())
        told = Overheard(identities[0].epoch, [str(address) for address in bound], hellos)
        partial = gate / "partial"
        partial.write_text(json.dumps(msgspec.to_builtins(told)), encoding="utf-8")
        partial.rename(gate / f"{told.epoch}.json")
        await asyncio.to_thread(until_open, gate)
        return bound

    StageGroup.listen = gated  # type: ignore[method-assign]
    return await Pipeline.start(options, on_progress)


def main() -> None:
    """Runs the command line, with an engine that starts its pipeline by `start`."""
    engine_options = EngineSettings.engine_options

    def behind_the_gate(
        self: EngineSettings,
        source: ModelSource,
        config: ModelConfig,
        changes: ConfigChanges = UNCHANGED,
        *,
        sharers: int = 1,
    ) -> EngineOptions:
        options = engine_options(self, source, config, changes, sharers=sharers)
        return msgspec.structs.replace(options, pipeline_start="tests.support.gated_serve:start")

    EngineSettings.engine_options = behind_the_gate  # type: ignore[method-assign]
    group.main()


if __name__ == "__main__":
    main()
