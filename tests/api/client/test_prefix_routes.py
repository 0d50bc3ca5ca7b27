"""Prompts with the same beginning are found, and nothing else is."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.client import prefix_routes
from api.client.prefix_routes import PIECE_TOKENS, PrefixRoutes
from tests.support.scheduling import request

PIECES = st.lists(st.integers(0, 2), min_size=0, max_size=4)


def prompt(pieces: list[int], rest: int = 0) -> list[int]:
    return [token for piece in pieces for token in [piece] * PIECE_TOKENS] + [9] * rest


@given(sent=st.lists(st.tuples(PIECES, st.integers(0, 3)), max_size=6), asked=PIECES)
def test_the_replica_of_the_longest_beginning_is_found(sent: list[tuple[list[int], int]], asked: list[int]) -> None:
    routes = PrefixRoutes()
    model: dict[tuple[int, ...], int] = {}
    for pieces, replica in sent:
        routes.note(request(0, prompt(pieces, rest=5), 1), replica)
        model |= {tuple(pieces[: end + 1]): replica for end in range(len(pieces))}
    known = [model[tuple(asked[:end])] for end in range(1, len(asked) + 1) if tuple(asked[:end]) in model]
    assert routes.find(request(1, prompt(asked, rest=3), 1)) == (known[-1] if known else None)


def test_salts_keep_tenants_apart() -> None:
    routes = PrefixRoutes()
    routes.note(request(0, prompt([1]), 1, cache_salt="a"), 1)
    assert routes.find(request(1, prompt([1]), 1)) is None
    assert routes.find(request(1, prompt([1]), 1, cache_salt="a")) == 1


def test_what_was_not_sent_for_long_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_routes, "PIECES_MAX", 2)
    routes = PrefixRoutes()
    asked = [request(number, prompt([number]), 1) for number in range(3)]
    for number in (0, 1, 0, 2):
        routes.note(asked[number], number)
    assert [routes.find(msgspec.structs.replace(one, request_id=9)) for one in asked] == [0, None, 2]
