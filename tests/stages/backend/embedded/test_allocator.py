"""The process keeps the memory that ops free."""

import subprocess
import sys
import textwrap

import pytest

from stages.backend.embedded.mesh import keep_freed_memory

PAGES_PER_MIB = 256
SIZES_MIB = range(1, 31)
SECONDS = 60


def page_faults_of_results(before: str) -> int:
    """The page faults of results that are each larger than all before, which glibc returns to the kernel by default.

    They are counted in a process of its own, whose allocator nothing else has used.
    """
    program = f"""
    import resource
    import torch
    from stages.backend import ttnn

    {before}

    def page_faults():
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    begin = page_faults()
    for mib in {SIZES_MIB!r}:
        torch.ones(mib << 20, dtype=torch.uint8)
    print(page_faults() - begin)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=SECONDS, check=True
    )
    return int(done.stdout)


def test_large_temporaries_do_not_fault_again() -> None:
    if not keep_freed_memory():
        pytest.skip("only glibc is told to keep memory")

    pages = sum(SIZES_MIB) * PAGES_PER_MIB
    # Some results fit into memory that glibc keeps anyway: a few hundred of 119 000 pages.
    assert page_faults_of_results("") >= pages * 0.95
    # The largest result alone has 1/15 of the pages, and glibc's heap has holes.
    assert page_faults_of_results("ttnn.open_mesh_device()") < pages / 3
