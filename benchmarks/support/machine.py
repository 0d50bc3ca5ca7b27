"""The machine that figures were measured on."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import msgspec

BFLOAT16_FLAGS = frozenset({"amx_bf16", "avx512_bf16"})
"""Flags in /proc/cpuinfo of processors with instructions for products of bfloat16."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The processor, the cores that this process may use, and the load (runnable threads in the last minute) before.

    `bfloat16` are the processor's instructions for products of bfloat16; without any, it has to widen the values.
    """

    processor: str
    cores: int
    bfloat16: list[str]
    load: float
    python: str
    torch: str

    @classmethod
    def here(cls) -> "Machine":
        """Describes this machine as it is now."""
        facts = _cpuinfo()
        return cls(
            processor=facts.get("model name", platform.machine()),
            cores=len(os.sched_getaffinity(0)),
            bfloat16=sorted(BFLOAT16_FLAGS & set(facts.get("flags", "").split())),
            load=os.getloadavg()[0],
            python=platform.python_version(),
            torch=version("torch"),
        )

    def __str__(self) -> str:
        instructions = ", ".join(self.bfloat16) or "no bfloat16 instructions"
        return f"{self.processor}, {self.cores} cores, {instructions}, load {self.load:.1f}"


def _cpuinfo() -> dict[str, str]:
    """The entries of the first processor."""
    entries = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    lines = (line.partition(":") for line in entries.splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}
