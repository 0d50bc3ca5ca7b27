"""The placement of stages on hosts and rows, refusals, claims to rows, and shares of cores."""

import itertools
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.cluster.placement import (
    RowClaim,
    has_rival,
    hosts_sentence,
    placements_beside,
    plan_placements,
    read_claims,
    refuse_impossible,
    taken_rows,
)
from actors.errors import PlacementError
from actors.stage.process import SPINS, THREAD_VARIABLES, CoreShare, apply_share, share_cores
from stages.step import Host, Topology


def topology(*rows: int) -> Topology:
    return Topology(
        hosts=[
            Host(node_id=f"n{i}", name=f"host-{i}", address=f"10.0.0.{i}", rows=count) for i, count in enumerate(rows)
        ]
    )


@st.composite
def clusters(draw: st.DrawFn) -> tuple[Topology, dict[str, set[int]]]:
    """Draws hosts with different numbers of rows, and the rows of each that are taken."""
    rows = draw(st.lists(st.integers(0, 8), min_size=1, max_size=5))
    taken = {f"n{i}": draw(st.sets(st.integers(0, 7), max_size=count)) for i, count in enumerate(rows)}
    return topology(*rows), taken


def stages_that_fit(free: set[int], rows_per_stage: int) -> int:
    """How many stages find adjacent rows, when from the lowest row on each takes the first it can."""
    count, row = 0, 0
    while row < 8:
        if free >= set(range(row, row + rows_per_stage)):
            count, row = count + 1, row + rows_per_stage
        else:
            row += 1
    return count


@given(clusters(), st.integers(0, 4), st.integers(1, 12), st.integers(1, 3))
def test_neighbours_share_a_host_and_no_row_is_given_twice(
    cluster: tuple[Topology, dict[str, set[int]]], first: int, stages: int, rows_per_stage: int
) -> None:
    there, taken = cluster
    free = {host.node_id: set(range(host.rows)) - taken[host.node_id] for host in there.hosts}
    room = {node: stages_that_fit(rows, rows_per_stage) for node, rows in free.items()}
    placements = plan_placements(there, taken, f"n{first}", stages, rows_per_stage)
    if placements is None:
        assert sum(room.values()) < stages
        return
    assert [placed.bundle for placed in placements] == list(range(stages))
    hosts = [placed.host.node_id for placed in placements]
    used = set(hosts)
    assert sum(a != b for a, b in itertools.pairwise(hosts)) == len(used) - 1
    holding = [
        set(some)
        for size in range(1, len(room) + 1)
        for some in itertools.combinations(room, size)
        if sum(room[node] for node in some) >= stages
    ]
    fewest = min(map(len, holding))
    assert len(used) == fewest
    with_engine = any(f"n{first}" in some and room[f"n{first}"] for some in holding if len(some) == fewest)
    assert (hosts[0] == f"n{first}") is with_engine
    for node in used:
        here = [placed for placed in placements if placed.host.node_id == node]
        owned = [row for placed in here for row in placed.rows]
        assert len(set(owned)) == len(owned) == len(here) * rows_per_stage
        assert free[node] >= set(owned)
        assert [placed.neighbour for placed in here] == list(range(len(here)))
        assert {placed.neighbours for placed in here} == {len(here)}
        assert all(placed.rows == list(range(placed.rows[0], placed.rows[0] + rows_per_stage)) for placed in here)


def test_linked_rows_are_given_to_neighbours_and_the_smallest_room_that_does() -> None:
    alone = plan_placements(topology(8), {"n0": {1, 5}}, "n0", stages=2, rows_per_stage=1)
    assert alone is not None
    assert [placed.rows for placed in alone] == [[6], [7]]
    best = plan_placements(topology(4, 8, 2, 3), {}, "elsewhere", stages=10, rows_per_stage=1)
    assert best is not None
    assert [placed.host.name for placed in best] == ["host-1"] * 8 + ["host-2"] * 2


def test_a_stage_that_moves_shares_cores_with_those_that_stayed() -> None:
    kept = plan_placements(topology(4, 4), {"n0": {2, 3}}, "n1", stages=1, rows_per_stage=1)
    moved = plan_placements(topology(4, 4), {"n0": {0, 1, 2, 3}, "n1": {0}}, "n0", stages=2, rows_per_stage=1)
    assert kept is not None
    assert moved is not None
    placed = [
        (placed.host.node_id, placed.rows, placed.neighbour, placed.neighbours)
        for placed in placements_beside(kept, moved)
    ]
    assert placed == [("n1", [1], 1, 3), ("n1", [2], 2, 3)]


def test_claims_are_read_from_names_and_rivals_found() -> None:
    placements = plan_placements(topology(2, 2), {}, "n1", stages=3, rows_per_stage=1)
    assert placements is not None
    claim, rival = RowClaim.of(placements), RowClaim.of(placements[2:])
    assert claim.rows == {"n1": [0, 1], "n0": [0]}
    assert read_claims(["", "somebody else's", claim.name, rival.name]) == [claim, rival]
    assert taken_rows([claim, rival]) == {"n1": {0, 1}, "n0": {0}}
    assert has_rival(claim, [claim, rival])
    assert not has_rival(claim, [claim])
    assert not has_rival(claim, [RowClaim("other", {"n0": [1], "n2": [0]})])


def test_a_refusal_says_what_is_needed_and_what_is_there() -> None:
    with pytest.raises(PlacementError) as refused:
        refuse_impossible(topology(4, 2), stages=4, rows_per_stage=2)
    assert str(refused.value) == (
        "4 stages of 2 rows need 8 Galaxy rows, each stage's on one host, but the cluster has 6: host-0 (4), "
        "host-1 (2): there is room for 3 of them. Add hosts, or use fewer stages."
    )
    with pytest.raises(PlacementError, match="no host of the cluster offers galaxy_rows"):
        refuse_impossible(topology(0), stages=1, rows_per_stage=1)


def test_a_refusal_counts_rows_in_use() -> None:
    assert hosts_sentence(topology(4, 2), {"n0": {0, 3}}) == "the cluster has 6: host-0 (4, 2 in use), host-1 (2)"


def test_rows_of_two_hosts_do_not_make_a_stage() -> None:
    with pytest.raises(PlacementError, match="room for 0"):
        refuse_impossible(topology(2, 2), stages=1, rows_per_stage=4)
    refuse_impossible(topology(2, 2), stages=2, rows_per_stage=2)


@given(st.sets(st.integers(0, 63), min_size=1), st.integers(1, 80))
def test_cores_are_shared_evenly_and_never_twice(cores: set[int], stages: int) -> None:
    shares = share_cores(sorted(cores), stages)
    assert len(shares) == stages
    if stages > len(cores):
        assert shares == [CoreShare(1, None)] * stages
        return
    runs = [share.cores or () for share in shares]
    assert sorted(core for run in runs for core in run) == sorted(cores)
    assert [share.threads for share in shares] == [len(run) for run in runs]
    assert max(map(len, runs)) - min(map(len, runs)) <= 1


def test_a_share_binds_the_process_and_sets_thread_counts() -> None:
    allowed = os.sched_getaffinity(0)
    one = min(allowed)
    environment: dict[str, str] = {}
    try:
        apply_share(CoreShare(1, (one,)), environment)
        assert os.sched_getaffinity(0) == {one}
    finally:
        apply_share(CoreShare(len(allowed), tuple(allowed)), {})
    assert os.sched_getaffinity(0) == allowed
    assert environment == {**dict.fromkeys(THREAD_VARIABLES, "1"), "GOMP_SPINCOUNT": SPINS}


@pytest.mark.parametrize("chosen", [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}])
def test_how_long_threads_spin_is_the_users_choice_first(chosen: dict[str, str]) -> None:
    environment = dict(chosen)
    apply_share(CoreShare(1, None), environment)
    assert environment == {**dict.fromkeys(THREAD_VARIABLES, "1"), **chosen}


def test_without_a_binding_the_cores_stay_as_they_are() -> None:
    allowed = os.sched_getaffinity(0)
    apply_share(CoreShare(1, None), {})
    assert os.sched_getaffinity(0) == allowed
