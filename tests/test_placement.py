"""Who sits where: seats, refusals, core shares."""

import itertools
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.cores import THREAD_VARIABLES, CoreShare, apply_share, share_cores
from actors.errors import PlacementError
from actors.placement import assign_seats, refuse_impossible
from stages.step import Host, Topology


def topology(*rows: int) -> Topology:
    return Topology(
        hosts=[
            Host(node_id=f"n{i}", name=f"host-{i}", address=f"10.0.0.{i}", rows=count) for i, count in enumerate(rows)
        ]
    )


@given(st.lists(st.integers(0, 3), min_size=1, max_size=16), st.integers(0, 4), st.integers(1, 4))
def test_neighbours_share_a_host_and_no_row_is_given_twice(nodes: list[int], first: int, rows_per_stage: int) -> None:
    seats = assign_seats([f"n{node}" for node in nodes], topology(*[64] * 5), f"n{first}", rows_per_stage)
    assert sorted(seat.bundle for seat in seats) == list(range(len(nodes)))
    assert all(seat.host.node_id == f"n{nodes[seat.bundle]}" for seat in seats)
    hosts = [seat.host.node_id for seat in seats]
    changes = sum(a != b for a, b in itertools.pairwise(hosts))
    assert changes == len(set(hosts)) - 1
    if first in nodes:
        assert hosts[0] == f"n{first}"
    owned = [(seat.host.node_id, row) for seat in seats for row in seat.rows]
    assert len(set(owned)) == len(owned) == len(nodes) * rows_per_stage
    for node in set(hosts):
        here = [seat for seat in seats if seat.host.node_id == node]
        assert [seat.neighbour for seat in here] == list(range(len(here)))
        assert {seat.neighbours for seat in here} == {len(here)}


def test_a_refusal_says_what_is_needed_and_what_is_there() -> None:
    with pytest.raises(PlacementError) as refused:
        refuse_impossible(topology(4, 2), stages=4, rows_per_stage=2)
    assert str(refused.value) == (
        "4 stages of 2 rows need 8 Galaxy rows, each stage's on one host, but the cluster has 6: host-0 (4), "
        "host-1 (2): there is room for 3 of them. Add hosts, or use fewer stages."
    )
    with pytest.raises(PlacementError, match="no host of the cluster offers galaxy_rows"):
        refuse_impossible(topology(0), stages=1, rows_per_stage=1)


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
    assert environment == dict.fromkeys(THREAD_VARIABLES, "1")


def test_without_a_binding_the_cores_stay_as_they_are() -> None:
    allowed = os.sched_getaffinity(0)
    apply_share(CoreShare(1, None), {})
    assert os.sched_getaffinity(0) == allowed
