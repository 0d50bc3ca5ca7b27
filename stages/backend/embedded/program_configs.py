"""Program configs, compute kernel configs and fabric settings: how a chip would run an op. They are not read here."""

import dataclasses
import enum
from typing import TypeAlias

from stages.backend.embedded.memory import CoreCoord


class MathFidelity(enum.Enum):
    """The number of passes of the matrix engine over a product's mantissa bits."""

    LoFi = 0
    HiFi2 = 2
    HiFi3 = 3
    HiFi4 = 4


class UnaryOpType(enum.Enum):
    """Activations that an op can apply to its input."""

    SILU = "silu"


class Topology(enum.Enum):
    """How the chips of a collective are connected."""

    Ring = 0
    Linear = 1


class FabricConfig(enum.Enum):
    """The network between chips."""

    DISABLED = 0
    FABRIC_1D = 1
    FABRIC_1D_RING = 2
    FABRIC_2D = 3


@dataclasses.dataclass(frozen=True)
class WormholeComputeKernelConfig:
    """The precision of a kernel on Wormhole."""

    math_fidelity: MathFidelity = MathFidelity.LoFi
    math_approx_mode: bool = True
    fp32_dest_acc_en: bool = False
    packer_l1_acc: bool = False
    dst_full_sync_en: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatmulMultiCoreReuseMultiCast1DProgramConfig:
    """The program of a matmul that multicasts one operand along a row or column of cores."""

    compute_with_storage_grid_size: CoreCoord | tuple[int, int]
    in0_block_w: int
    out_subblock_h: int
    out_subblock_w: int
    per_core_M: int  # noqa: N815 - ttnn's name
    per_core_N: int  # noqa: N815 - ttnn's name
    fuse_batch: bool
    fused_activation: UnaryOpType | None
    mcast_in0: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatmulMultiCoreReuseMultiCastProgramConfig:
    """The program of a matmul over a two-dimensional grid of cores."""

    compute_with_storage_grid_size: CoreCoord | tuple[int, int]
    in0_block_w: int
    out_subblock_h: int
    out_subblock_w: int
    per_core_M: int  # noqa: N815 - ttnn's name
    per_core_N: int  # noqa: N815 - ttnn's name
    transpose_mcast: bool
    fused_activation: UnaryOpType | None
    fuse_batch: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class SDPAProgramConfig:
    """The chunk sizes of attention."""

    compute_with_storage_grid_size: CoreCoord | tuple[int, int]
    q_chunk_size: int
    k_chunk_size: int
    exp_approx_mode: bool | None = None
    max_cores_per_head_batch: int = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerNormShardedMultiCoreProgramConfig:
    """The program of a norm of a sharded tensor."""

    compute_with_storage_grid_size: CoreCoord | tuple[int, int]
    subblock_w: int
    block_h: int
    block_w: int
    inplace: bool


MatmulProgramConfig: TypeAlias = (
    MatmulMultiCoreReuseMultiCast1DProgramConfig | MatmulMultiCoreReuseMultiCastProgramConfig
)


def set_fabric_config(config: FabricConfig) -> None:
    """Does nothing, as the chips of an embedded mesh share one memory and need no network."""
