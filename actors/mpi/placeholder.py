"""A rank's placeholder: mpirun starts it so that there is a rank, and a stage's process then takes its identity over.

A program of the standard library alone, run by its path. It prints one line, "RANK " with its rank and pid, and then
waits to be ended: by mpirun, or where its daemon dies by the kernel. Rank 0 also ends, and the world with it, when its
standard input does, which mpirun passes on to it: so the world goes when its maker is killed.

Its identity stays in its environment, where the stage reads it. mpirun passes output on as it comes, and a terminal,
which it gives its ranks, takes lines of more than 2048 bytes in pieces: those of several ranks would mix.
"""

import ctypes
import os
import signal
import sys

RANK_VARIABLE = "OMPI_COMM_WORLD_RANK"
PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


def main() -> int:
    """Never returns 0, as mpirun takes that for the end of one rank only, and anything else for the end of all."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    rank = int(os.environ[RANK_VARIABLE])
    # In one piece: the ranks' lines share a pipe.
    os.write(sys.stdout.fileno(), f"RANK {rank} {os.getpid()}\n".encode())
    if rank == 0:
        while os.read(sys.stdin.fileno(), 1):
            pass
        return 1
    while True:
        signal.pause()


if __name__ == "__main__":
    sys.exit(main())
