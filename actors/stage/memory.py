"""Memory of this process."""

import os
from pathlib import Path

_STATM = Path("/proc/self/statm")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """What of it lies in physical memory, shared pages such as mapped weight files included."""
    return int(_STATM.read_bytes().split()[1]) * _PAGE_BYTES
