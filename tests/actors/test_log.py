"""The relay of what stages write to stderr, through a pipe with a name, to the engine's."""

import asyncio
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from actors.log import StderrRelay, send_stderr_to

SECONDS = 30
WRITE = """
import os, sys
from actors.log import send_stderr_to
send_stderr_to(sys.argv[1])
sys.stdout.write("by Python\\n")
sys.stdout.flush()
os.write(2, b"by the system\\n")
"""


async def test_what_another_process_writes_comes_out_here(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    relay = StderrRelay(tmp_path / "stderr")
    assert stat.S_IMODE(relay.path.stat().st_mode) == 0o600
    writers = [await asyncio.create_subprocess_exec(sys.executable, "-c", WRITE, str(relay.path)) for _ in range(2)]
    assert [await asyncio.wait_for(writer.wait(), SECONDS) for writer in writers] == [0, 0]
    relay.close()
    said = capfd.readouterr()
    assert sorted(said.err.splitlines()) == ["by Python", "by Python", "by the system", "by the system"]
    assert (said.out, relay.path.exists()) == ("", False)


def test_a_stage_can_write_on_when_its_engine_has_gone(tmp_path: Path) -> None:
    async def come_and_go() -> None:
        StderrRelay(tmp_path / "stderr").close()

    asyncio.run(come_and_go())
    with pytest.raises(FileNotFoundError):
        send_stderr_to(str(tmp_path / "stderr"))
    # One that has opened it before is not ended by a pipe that nobody reads.
    program = f"import os; os.mkfifo({str(tmp_path / 'pipe')!r})\n{WRITE}"
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "pipe")], check=False, timeout=SECONDS)
    assert done.returncode == 0
