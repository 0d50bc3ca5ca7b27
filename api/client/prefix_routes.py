"""Which replica has which beginnings of prompts in its cache, as far as the front end can know."""

import hashlib
from array import array
from collections import OrderedDict

from api.messages.engine import AddRequest

PIECE_TOKENS = 256
"""Tokens of a piece: fewer would cost more memory here, and save little work there."""

PIECES_MAX = 1 << 16
"""Pieces that are remembered: 16.8 million tokens, in some 10 MB."""

DIGEST_BYTES = 16


class PrefixRoutes:
    """Remembers where prompts went, piece by piece; what was not sent for the longest time is forgotten first."""

    def __init__(self) -> None:
        self._replicas: OrderedDict[bytes, int] = OrderedDict()

    def find(self, request: AddRequest) -> int | None:
        """The replica that got the longest beginning of the request's prompt; None where none did."""
        found: int | None = None
        for piece in _pieces(request):
            replica = self._replicas.get(piece)
            if replica is None:
                break
            found = replica
        return found

    def note(self, request: AddRequest, replica: int) -> None:
        """Records that a request goes to a replica."""
        for piece in _pieces(request):
            self._replicas[piece] = replica
            self._replicas.move_to_end(piece)
        while len(self._replicas) > PIECES_MAX:
            self._replicas.popitem(last=False)


def _pieces(request: AddRequest) -> list[bytes]:
    """A digest for each beginning of the prompt that is whole pieces long; salts keep tenants apart."""
    digest = hashlib.blake2b(request.cache_salt.encode(), digest_size=DIGEST_BYTES)
    pieces = []
    for end in range(PIECE_TOKENS, len(request.tokens) + 1, PIECE_TOKENS):
        digest.update(array("I", request.tokens[end - PIECE_TOKENS : end]).tobytes())
        pieces.append(digest.digest())
    return pieces
