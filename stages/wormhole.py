"""The hardware of a Wormhole chip of a Galaxy: memory, bandwidth, arithmetic and links, with their sources.

TT-Metal's reports are at https://github.com/tenstorrent/tt-metal/tree/main/tech_reports.
"""

from typing import Literal

PREFILL_CHUNK = 256
"""The most tokens of a prefill step unless an option says otherwise: of R1 on a row, 2048 take 2.3 GiB more
of each chip."""

USERS_PER_ROW = 32
"""Users of a Galaxy row in one microbatch, as tt-metal's demo has them."""

TOKENS_AT_ONCE = 2048
"""Tokens of one pass through a chip's experts: buffers in L1 grow with them, and 2048 is what fits."""

HEADS_TOGETHER = 16
"""The heads of a column of chips come in multiples of this: `all_to_all` gathers them by half tiles."""

GALAXY_ROWS = 4
GALAXY_COLUMNS = 8
"""Chips of a Galaxy: 4 rows of 8 (tt_metal/fabric/mesh_graph_descriptors/single_galaxy_mesh_graph_descriptor)."""

DRAM_BANKS = 12
DRAM_BANK_BYTES = 1_072_693_184
"""Bytes of a bank that ttnn 0.81.1's allocator can use: `ttnn.get_memory_view(mesh, ttnn.BufferType.DRAM)` of a Galaxy
with no trace region. A chip has 12 GiB; the first MiB of each bank is the firmware's."""

DRAM_BYTES = DRAM_BANKS * DRAM_BANK_BYTES
DRAM_ALIGNMENT = 32
"""Pages of interleaved tensors begin at multiples of it."""

TRACE_ALIGNMENT = 8192
"""A trace region takes whole multiples of it from every bank, as the same allocator reports."""

CORES = 64
"""Cores of a chip that a program may use: 8 x 8."""

L1_BANKS = CORES
L1_BANK_BYTES = 1_393_312
"""Bytes of a core's 1.5 MB that the same allocator can use, on each of the 8 x 8 cores of programs."""

L1_BYTES = L1_BANKS * L1_BANK_BYTES

DRAM_BYTES_PER_S = 288e9
"""The bandwidth of DRAM (docs.tenstorrent.com/aibs/wormhole/specifications.html: 12 GT/s on 192 bits)."""

Fidelity = Literal["LoFi", "HiFi2", "HiFi3", "HiFi4"]

PASSES: dict[Fidelity, int] = {"LoFi": 1, "HiFi2": 2, "HiFi3": 3, "HiFi4": 4}
"""Passes of the matrix engine over the mantissas (GEMM_FLOPS.md: 16 cycles a tile and pass)."""

MATRIX_FLOPS_PER_S = 64 * 4096e9
"""Operations in one pass: 8x16 by 16x16 each cycle on each of 64 cores at 1 GHz (GEMM_FLOPS.md)."""

LINK_BYTES_PER_S = 12.5e9
"""Line rate of an Ethernet link, each way (CCL_bandwidth.md)."""

LINKS = 4
"""Links between neighbouring chips of a Galaxy (the mesh graph descriptor above: `channels { count: 4 }`)."""

HOST_BYTES_PER_S = 8e9
"""What a host is assumed to write to its chips each second: a quarter of PCIe 4.0 x16's 31.5 GB/s. Not measured."""

HOP_S = 874e-9
"""The latency from chip to chip on the 2D fabric (CCL_bandwidth.md)."""


def flops_per_s(fidelity: Fidelity) -> float:
    """Returns the peak of a chip's matrix engines, in multiplications and additions a second."""
    return MATRIX_FLOPS_PER_S / PASSES[fidelity]
