"""How each op is called: one dataclass for each kind, splatted into it as `ttnn.linear(x, **config["w1"])`.

Field names are the op's own keyword arguments. A field that is None is left out, so that the op's default holds.
Operands that are weights stay None until `run_config` fills them.
"""

import dataclasses
from collections.abc import KeysView, Sequence
from typing import Any

from stages.backend import ttnn


@dataclasses.dataclass(frozen=True, eq=False)
class OpConfig:
    """Base of all op configs: a mapping of the fields that are set."""

    _arguments: dict[str, Any] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        operands = (name for name in operand_names(self) if getattr(self, name) is not None)
        object.__setattr__(self, "_arguments", {name: getattr(self, name) for name in operands})

    def keys(self) -> KeysView[str]:
        """Names of the fields that are set."""
        return self._arguments.keys()

    def __getitem__(self, name: str) -> Any:
        return self._arguments[name]


def operand_names(config: OpConfig) -> list[str]:
    """The keyword arguments that a kind of op config can give."""
    return [field.name for field in dataclasses.fields(config) if field.init]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LinearConfig(OpConfig):
    """ttnn.linear: `input_tensor_b` is the weight [.., in, out]."""

    input_tensor_b: ttnn.Tensor | None = None
    dtype: ttnn.DataType | None = None
    memory_config: ttnn.MemoryConfig | None = None
    program_config: object | None = None
    compute_kernel_config: ttnn.WormholeComputeKernelConfig | None = None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class MulConfig(OpConfig):
    """ttnn.mul: activations are applied to the first factor before."""

    input_tensor_a_activations: Sequence[ttnn.UnaryOpType] | None = None
    memory_config: ttnn.MemoryConfig | None = None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class RMSNormConfig(OpConfig):
    """ttnn.rms_norm and ttnn.rms_norm_post_all_gather: `weight` is [1, 1, 1, width]."""

    epsilon: float
    weight: ttnn.Tensor | None = None
    memory_config: ttnn.MemoryConfig | None = None
    compute_kernel_config: ttnn.WormholeComputeKernelConfig | None = None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class EmbeddingConfig(OpConfig):
    """ttnn.embedding: `weight` is a table [rows, width]."""

    weight: ttnn.Tensor | None = None
    layout: ttnn.Layout | None = None
    memory_config: ttnn.MemoryConfig | None = None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class AllGatherConfig(OpConfig):
    """Concatenates the shards along `dim` of the chips on a mesh axis."""

    dim: int
    cluster_axis: int
    memory_config: ttnn.MemoryConfig | None = None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ReduceScatterConfig(OpConfig):
    """Adds the tensors of the chips on a mesh axis; each keeps its part of `dim`."""

    dim: int
    cluster_axis: int
    memory_config: ttnn.MemoryConfig | None = None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class AllReduceConfig(OpConfig):
    """Adds the tensors of the chips on a mesh axis."""

    cluster_axis: int
    memory_config: ttnn.MemoryConfig | None = None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class AllToAllConfig(OpConfig):
    """Swaps sharded dimensions on a mesh axis: `in_dim` is gathered, `out_dim` is split."""

    in_dim: int
    out_dim: int
    cluster_axis: int
    memory_config: ttnn.MemoryConfig | None = None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class MeshPartitionConfig(OpConfig):
    """Each chip on a mesh axis keeps its part of `dim` of a tensor that all of them hold."""

    dim: int
    cluster_axis: int
    memory_config: ttnn.MemoryConfig | None = None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class RotaryConfig(OpConfig):
    """ttnn.experimental.rotary_embedding_llama: tokens on dimension 2, in prefill and in decode."""

    is_decode_mode: bool
    memory_config: ttnn.MemoryConfig | None = None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class MLADecodeConfig(OpConfig):
    """ttnn.transformer.paged_flash_multi_latent_attention_decode: values are the first `head_dim_v` of the cache."""

    head_dim_v: int
    scale: float
    program_config: ttnn.SDPAProgramConfig | None = None
    compute_kernel_config: ttnn.WormholeComputeKernelConfig | None = None
    memory_config: ttnn.MemoryConfig | None = None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class MLAPrefillConfig(OpConfig):
    """ttnn.transformer.chunked_flash_mla_prefill."""

    scale: float
    program_config: ttnn.SDPAProgramConfig | None = None
    compute_kernel_config: ttnn.WormholeComputeKernelConfig | None = None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class MoEGateConfig(OpConfig):
    """composite.moe_gate: `bias` is [1, 1, 1, experts]."""

    n_groups: int
    topk_groups: int
    n_activated_experts: int
    route_scale: float
    norm_topk_prob: bool
    bias: ttnn.Tensor | None = None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class RoutedExpertsConfig(OpConfig):
    """composite.routed_experts: w1 and w3 [1, experts / chips, hidden, inner], w2 with its last two swapped."""

    w1: ttnn.Tensor | None = None
    w3: ttnn.Tensor | None = None
    w2: ttnn.Tensor | None = None
    memory_config: ttnn.MemoryConfig | None = None
    compute_kernel_config: ttnn.WormholeComputeKernelConfig | None = None
