"""The release that all hosts of a pipeline have to run."""

import sys

from actors.errors import ReleaseError
from stages.step import PROTOCOL_VERSION
from weights.release import VERSION


def own_release() -> str:
    """Returns the release that this process runs, as text; two processes fit together where it is the same.

    Patch releases of Python are left out, as what passes between processes is the same in all of them.
    """
    return (
        f"galaxyline {VERSION} with protocol {PROTOCOL_VERSION} on Python {sys.version_info[0]}.{sys.version_info[1]}"
    )


def refuse_other_release(wanted: str, host: str) -> None:
    """Raises ReleaseError unless this process, on `host`, runs the release `wanted`."""
    if own_release() != wanted:
        raise ReleaseError(release_sentence(host, f"runs {own_release()}", wanted))


def release_sentence(host: str, what: str, wanted: str) -> str:
    """Returns a sentence on `what` a host has instead of the release that is `wanted` on all."""
    return f"{host} {what}, and the pipeline needs {wanted}: install the same on every host of the cluster."
