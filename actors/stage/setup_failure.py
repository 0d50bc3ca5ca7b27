"""Why Ray could not make a stage's actor, as an error of ours: Ray tells whole stories, with a traceback in them."""

import re

from actors.errors import ReleaseError, StartError
from actors.release import own_release, release_sentence
from weights.errors import GalaxylineError

_RELEASE = re.compile(r"\bReleaseError: (.*)")
_OUR_MODULE = re.compile(r"No module named '(actors|stages|weights)\b|from '(actors|stages|weights)\b")


def setup_failure(stage: int, host: str, told: str) -> GalaxylineError:
    """The error for what Ray `told` of an actor whose constructor failed or could not even be read."""
    cause = last_line(told)
    if refused := _RELEASE.search(cause):
        return ReleaseError(refused[1])
    if _OUR_MODULE.search(cause):
        what = f"has no galaxyline that Ray's processes can use ({cause})"
        return ReleaseError(release_sentence(host, what, own_release()))
    return StartError(f"Stage {stage} on {host} could not be set up: {cause}")


def last_line(told: str) -> str:
    """What a traceback ends with."""
    return next((line.strip() for line in reversed(told.splitlines()) if line.strip()), "no cause was given")
