"""The table of docs/ops.md, with the result of every case of `tests.support.op_cases` on the embedded device and ttnn.

`python -m tests.support.op_table` writes the column of the embedded device again, `python -m tests.galaxy.op_table`
that of ttnn.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stages.backend import DEVICE, ttnn
from stages.errors import DeviceError
from tests import ROOT
from tests.support.op_cases import CASES
from tests.support.op_cases.case import Case

DOCUMENT = ROOT / "docs" / "ops.md"
HEADER = "| op | case | embedded | ttnn | where they differ |"
RULE = "|---|---|---|---|---|"
MESHES = ((1, 8), (2, 8), (4, 8))
REFUSED = "refused"

REFUSALS = DeviceError if DEVICE == "embedded" else RuntimeError
"""The error by which a device refuses. ttnn's bindings raise TypeError for an unknown signature, which is a mistake of
the case."""

Key = tuple[str, str]
"""An op and the name of a case."""


@dataclasses.dataclass(frozen=True)
class Row:
    """The result of a case on each device: shapes on each chip, dtypes and layouts, or REFUSED."""

    embedded: str = ""
    ttnn: str = ""


def key_of(case: Case) -> Key:
    """The key of a case in the table."""
    return case.op, case.name


def read() -> dict[Key, Row]:
    """Reads the table from docs/ops.md."""
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    cells = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[_first(lines) :])
    return {(op.strip("`"), name): Row(embedded, at_ttnn) for op, name, embedded, at_ttnn, _ in cells}


def note(case: Case, row: Row) -> str:
    """The last cell of a row: which device is stricter, if they differ, and why."""
    if row.embedded == row.ttnn:
        return ""
    return f"{'embedded' if row.embedded == REFUSED else 'ttnn'} is stricter: {case.differs}"


def observed(mesh_shape: tuple[int, int]) -> dict[Key, str]:
    """Runs the cases for a mesh on the device of this process; returns their results."""
    with _opened(mesh_shape) as mesh:
        return {key_of(case): _outcome(case, mesh) for case in CASES if case.mesh == mesh_shape}


def rendered(rows: dict[Key, Row]) -> str:
    """The text of docs/ops.md with these rows in its table."""
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    kept = lines[: _first(lines)]
    for case in CASES:
        row = rows[key_of(case)]
        kept.append(f"| `{case.op}` | {case.name} | {row.embedded} | {row.ttnn} | {note(case, row)} |")
    return "\n".join(kept) + "\n"


def write() -> None:
    """Writes this device's column again."""
    seen = {key: outcome for shape in MESHES for key, outcome in observed(shape).items()}
    before = read()
    rows = {key: dataclasses.replace(before.get(key, Row()), **{DEVICE: outcome}) for key, outcome in seen.items()}
    DOCUMENT.write_text(rendered(rows), encoding="utf-8")


def _first(lines: list[str]) -> int:
    """The line number of the first row of the table."""
    return lines.index(HEADER) + 2


@contextmanager
def _opened(shape: tuple[int, int]) -> Iterator[ttnn.MeshDevice]:
    ttnn.set_fabric_config(ttnn.FabricConfig.FABRIC_2D)
    mesh = ttnn.open_mesh_device(ttnn.MeshShape(*shape))
    try:
        yield mesh
    finally:
        ttnn.close_mesh_device(mesh)
        ttnn.set_fabric_config(ttnn.FabricConfig.DISABLED)


def _outcome(case: Case, mesh: ttnn.MeshDevice) -> str:
    try:
        return _described(case.call(mesh))
    except REFUSALS:
        return REFUSED


def _described(result: object) -> str:
    if isinstance(result, tuple | list):
        return " and ".join(_described(one) for one in result)
    if isinstance(result, torch.Tensor):
        return f"{list(result.shape)} of torch"
    assert isinstance(result, ttnn.Tensor)
    return f"{list(result.shape)} {result.dtype.name} {result.layout.name}"


if __name__ == "__main__":
    write()
