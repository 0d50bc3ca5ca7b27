"""The environment in which ttnn finds mock Galaxies."""

from pathlib import Path

from tests.support.mock_galaxy.compiler import make_runtime_root
from tests.support.mock_galaxy.descriptors import cluster_descriptor


def mock_environment(folder: Path, rows: range, all_rows: int) -> dict[str, str]:
    """Variables for a process whose host owns `rows` of `all_rows`; their files are created in the empty `folder`.

    Several processes may share a folder's runtime root, but not its cache.
    """
    root = folder / "root"
    make_runtime_root(root)
    descriptor = folder / "cluster.yaml"
    descriptor.write_text(cluster_descriptor(rows, all_rows), encoding="utf-8")
    return {
        "TT_METAL_MOCK_CLUSTER_DESC_PATH": str(descriptor),
        "TT_METAL_RUNTIME_ROOT": str(root),
        "TT_METAL_CACHE": str(folder / "cache"),
        # Fast dispatch needs kernels that answer.
        "TT_METAL_SLOW_DISPATCH_MODE": "1",
        "TT_LOGGER_LEVEL": "fatal",
    }
