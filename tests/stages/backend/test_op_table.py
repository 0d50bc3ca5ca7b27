"""The embedded device accepts and refuses what docs/ops.md has for it; tests/galaxy compares the table with ttnn."""

import pytest

from tests.support.op_cases import CASES
from tests.support.op_names import OPS
from tests.support.op_table import DOCUMENT, MESHES, REFUSED, key_of, observed, read, rendered

NOT_ON_A_MOCK = {"begin_trace_capture", "end_trace_capture", "execute_trace", "release_trace"}

AROUND_TENSORS = {
    "ConcatMesh2dToTensor",
    "ConcatMeshToTensor",
    "ReplicateTensorToMesh",
    "ShardTensor2dMesh",
    "ShardTensorToMesh",
    "close_mesh_device",
    "create_global_semaphore",
    "create_sharded_memory_config",
    "deallocate",
    "get_device_tensors",
    "num_cores_to_corerangeset",
    "open_mesh_device",
    "set_fabric_config",
    "synchronize_device",
    "to_device",
}
"""Functions that create no tensor on a mesh themselves; cases of other ops call them."""

SMALLER_THAN_SERVED = {("experimental.all_to_all_async_generic", "one head a chip")}


@pytest.mark.parametrize("mesh_shape", MESHES)
def test_the_embedded_device_does_what_the_table_says(mesh_shape: tuple[int, int]) -> None:
    rows = read()
    expected = {key_of(case): rows[key_of(case)].embedded for case in CASES if case.mesh == mesh_shape}
    assert observed(mesh_shape) == expected


def test_the_table_is_that_of_the_cases() -> None:
    assert len({key_of(case) for case in CASES}) == len(CASES)
    assert DOCUMENT.read_text(encoding="utf-8") == rendered(read())
    assert {case.mesh for case in CASES} == set(MESHES)


def test_devices_differ_only_where_it_is_said_why() -> None:
    rows = read()
    differing = {key_of(case) for case in CASES if rows[key_of(case)].embedded != rows[key_of(case)].ttnn}
    assert differing == {key_of(case) for case in CASES if case.differs}


def test_the_embedded_device_accepts_nothing_that_ttnn_refuses() -> None:
    rows = read()
    assert {key for key, row in rows.items() if row.embedded not in (row.ttnn, REFUSED)} == SMALLER_THAN_SERVED


def test_every_op_is_accepted_once_and_refused_once() -> None:
    rows = read()
    accepted = {op for (op, _), row in rows.items() if row.embedded != REFUSED}
    refused = {op for (op, _), row in rows.items() if row.embedded == REFUSED}
    called = {OPS[op] for op in accepted}
    missing = {name for name, function in OPS.items() if function not in called}
    assert missing == NOT_ON_A_MOCK | AROUND_TENSORS
    assert accepted - refused == {"from_device", "clone"}
