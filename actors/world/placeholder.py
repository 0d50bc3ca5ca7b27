"""A rank's placeholder: mpirun starts it so that there is a rank, and a stage's process then takes its identity over.

A program of the standard library alone, run by its path. It prints one line, "RANK " and its pid, rank and identity as
JSON, and then waits to be ended: by mpirun, or where its daemon dies by the kernel. Rank 0 also ends, and the world
with it, when its standard input does, which mpirun passes on to it: so the world goes when its maker is killed.
"""

import ctypes
import json
import os
import signal
import sys

MARK = "RANK "
PREFIXES = ("PMIX_", "OMPI_", "PRTE_")
PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


def main() -> int:
    """Never returns 0: mpirun takes that for the end of one rank only, and anything else for that of all."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    identity = {name: value for name, value in os.environ.items() if name.startswith(PREFIXES)}
    rank = int(identity["OMPI_COMM_WORLD_RANK"])
    line = MARK + json.dumps({"rank": rank, "pid": os.getpid(), "identity": identity}) + "\n"
    # In one piece: the ranks' lines share a pipe.
    os.write(sys.stdout.fileno(), line.encode())
    if rank == 0:
        while os.read(sys.stdin.fileno(), 1):
            pass
        return 1
    while True:
        signal.pause()


if __name__ == "__main__":
    sys.exit(main())
