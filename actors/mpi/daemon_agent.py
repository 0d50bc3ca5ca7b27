"""The program that mpirun calls instead of ssh to start its daemon on another host: `... SOCKET HOST COMMAND...`.

A program of the standard library alone, run by its path. It hands host and command to the pipeline's own process at the
unix socket SOCKET, waits as ssh would while the command runs, and ends with its exit status.
"""

import json
import socket
import sys


def main(arguments: list[str]) -> int:
    """Returns the command's exit status, or 255, as ssh does, where nobody ran it."""
    # mpirun sometimes puts an empty argument before the host.
    path, host, *command = [argument for argument in arguments if argument]
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        connection.sendall(json.dumps({"host": host, "command": " ".join(command)}).encode() + b"\n")
        status = connection.makefile().readline()
    return int(status) if status else 255


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
