"""Which rows of which host belong to which pipeline, as the names of their placement groups say.

Ray counts a host's rows and does not number them, but a row's number decides which chips a stage opens. So whoever
makes a placement group writes the rows into its name, looks at the names of all others, and gives way where two want
the same row: whoever saw none has them, as all who come after it see its name. A claim ends with its group, and Ray
removes that with the job that made it.
"""

import secrets
from collections.abc import Iterable, Sequence

import msgspec

from actors.cluster.placement import Seat

PREFIX = "galaxyline rows "


class RowClaim(msgspec.Struct, frozen=True):
    """Row numbers by node id; `token` tells claims to the same rows apart."""

    token: str
    rows: dict[str, list[int]]

    @classmethod
    def of(cls, seats: Sequence[Seat]) -> "RowClaim":
        """A new claim to the rows of all seats."""
        rows: dict[str, list[int]] = {}
        for seat in seats:
            rows.setdefault(seat.host.node_id, []).extend(seat.rows)
        return cls(secrets.token_hex(8), rows)

    @property
    def name(self) -> str:
        """The placement group's."""
        return PREFIX + msgspec.json.encode(self).decode()


def read_claims(names: Iterable[str]) -> list[RowClaim]:
    """The claims among the names of placement groups."""
    written = (name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX))
    return [msgspec.json.decode(claim, type=RowClaim) for claim in written]


def taken_rows(claims: Iterable[RowClaim]) -> dict[str, set[int]]:
    """Row numbers that are claimed, by node id."""
    taken: dict[str, set[int]] = {}
    for claim in claims:
        for node, rows in claim.rows.items():
            taken.setdefault(node, set()).update(rows)
    return taken


def has_rival(claim: RowClaim, claims: Iterable[RowClaim]) -> bool:
    """Whether another claim has one of the same rows."""
    others = taken_rows(other for other in claims if other.token != claim.token)
    return any(others.get(node, set()).intersection(rows) for node, rows in claim.rows.items())
