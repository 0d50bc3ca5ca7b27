"""Memory that ops free stays with the process."""

import resource

import pytest
import torch

from stages.backend import ttnn
from stages.backend.embedded.allocator import keep_freed_memory

MIB = 1 << 20


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def test_large_temporaries_do_not_fault_again() -> None:
    ttnn.open_mesh_device()
    if not keep_freed_memory():
        pytest.skip("only glibc is told to keep memory")
    values = torch.ones(2 * MIB)
    for _ in range(3):
        (values + 1) * (values + 2)
    before = page_faults()
    for _ in range(10):
        (values + 1) * (values + 2)
    # Ten times three results of 8 MiB are 61 440 pages.
    assert page_faults() - before < 6000
