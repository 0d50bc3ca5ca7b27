"""How much an engine has to do, and which of several gets the next request."""

from collections.abc import Sequence

import msgspec


class Load(msgspec.Struct, frozen=True, order=True):
    """The open requests of an engine, and the tokens that these have or may come to have, prompts included.

    Loads are ordered by requests; where these are equal, by tokens.
    """

    requests: int
    tokens: int


def least_loaded(loads: Sequence[Load | None], last: int) -> int | None:
    """The place of the engine that gets the next request; None where there is none to give it to.

    `loads` has None for an engine that takes no requests. Among equals it is the next one after `last`, the place of
    the engine that got the request before, so that idle engines take turns.
    """
    places = [place for place, load in enumerate(loads) if load is not None]
    return min(places, key=lambda place: (loads[place], (place - last - 1) % len(loads)), default=None)
