"""Run configs: op configs, weight files and state, made by the three stages of a module, joined into one."""

import dataclasses
import json
from collections.abc import Callable, KeysView, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from stages.backend import ttnn
from stages.errors import DeviceError
from stages.models.architecture import WeightSpec
from stages.options import Dtype
from stages.tensor_dtypes import TensorDtype

TORCH_DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}

FLOATS: dict[TensorDtype, ttnn.DataType] = {
    "float32": ttnn.float32,
    "bfloat16": ttnn.bfloat16,
    "bfloat8_b": ttnn.bfloat8_b,
    "bfloat4_b": ttnn.bfloat4_b,
}


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
    """Returns the keyword arguments that a kind of op config can have."""
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
class GatheredLinearConfig(OpConfig):
    """fused.gathered_linear: `input_tensor_b` is the weight [1, 1, in of all columns, out]."""

    input_tensor_b: ttnn.Tensor | None = None
    chunk_sizes: Sequence[int] | None = None
    fuse_swiglu: bool | None = None
    memory_config: ttnn.MemoryConfig | None = None
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
    """ttnn.experimental.deepseek_prefill.rotary_embedding_indexed: its tables begin with the step's own tokens."""

    kv_actual_global: int
    cluster_axis: int
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
    """composite.moe_gate and mixture.routing: `bias` is [1, 1, 1, experts]."""

    n_groups: int
    topk_groups: int
    n_activated_experts: int
    route_scale: float
    norm_topk_prob: bool
    bias: ttnn.Tensor | None = None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class RoutedExpertsConfig(OpConfig):
    """composite.routed_experts: w1 and w3 [1, experts / chips, hidden, inner], w2 with its last two swapped.

    mixture.stacked_experts: w13 and w2, all experts of a chip in one matrix.
    """

    w1: ttnn.Tensor | None = None
    w3: ttnn.Tensor | None = None
    w13: ttnn.Tensor | None = None
    w2: ttnn.Tensor | None = None
    memory_config: ttnn.MemoryConfig | None = None
    compute_kernel_config: ttnn.WormholeComputeKernelConfig | None = None


WeightConfig: TypeAlias = "dict[str, str | WeightConfig]"

"""Operation name -> path of its weight file, or paths by operand; a submodule's name -> its own WeightConfig."""

OperatorConfig: TypeAlias = "dict[str, OpConfig | OperatorConfig]"

"""Operation name -> how to call it; a submodule's name -> its own OperatorConfig."""

StateDict: TypeAlias = Mapping[str, torch.Tensor]

"""Names of a module's tensors, relative to it, -> tensors as torch stores them."""

SUFFIX = ".tensorbin"

MANIFEST = "weight_config.json"


def weight_path(directory: Path, operation: str, operand: str) -> Path:
    """Returns the file of a weight: its middle part names the operand of the op that it fills."""
    return directory / f"{operation}.{operand}{SUFFIX}"


def dump_weight(
    directory: Path, operation: str, spec: WeightSpec, weight: torch.Tensor, mesh_device: ttnn.MeshDevice
) -> str:
    """Writes one tensor for a mesh and returns its path in `directory`. The file holds the shards of every chip.

    Raises DeviceError where `weight` does not have the shape of `spec`.
    """
    shape = spec.on_mesh(mesh_device.shape[0])
    if tuple(weight.shape) != shape:
        raise DeviceError(f"{operation}.{spec.operand} is {list(shape)}, not {list(weight.shape)}.")
    path = weight_path(directory, operation, spec.operand)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensor = ttnn.from_torch(
        weight, dtype=FLOATS[spec.dtype], layout=layout_of(spec), mesh_mapper=weight_mapper(spec, mesh_device)
    )
    # Not for all ranks of an MPI world together: each stage has weights of its own.
    ttnn.dump_tensor(str(path), tensor, mode=ttnn.DumpTensorMode.LOCAL)
    return str(path)


def layout_of(spec: WeightSpec) -> ttnn.Layout:
    """ttnn's layout of a weight."""
    return ttnn.TILE_LAYOUT if spec.is_tiled else ttnn.ROW_MAJOR_LAYOUT


def weight_mapper(spec: WeightSpec, mesh_device: ttnn.MeshDevice) -> ttnn.TensorToMesh:
    """Returns the mapper that shares a weight out over the chips."""
    if spec.all_chips is not None:
        return ttnn.ShardTensorToMesh(mesh_device, dim=spec.all_chips)
    return ttnn.ShardTensor2dMesh(mesh_device, tuple(mesh_device.shape), spec.dims)


def merge_run_config(
    operators: Mapping[str, Any],
    weights: Mapping[str, Any],
    state: Mapping[str, Any],
    loaded: dict[str, ttnn.Tensor] | None = None,
) -> dict[str, Any]:
    """Returns op configs with their weights loaded onto the mesh, beside the state.

    `state["mesh_device"]` is the mesh; `loaded` are tensors by file that are on it already, and is added to. Raises
    DeviceError where a weight file fits no op, or a name is used twice.
    """
    mesh_device = state["mesh_device"]
    tensors = {} if loaded is None else loaded

    def load(path: str) -> ttnn.Tensor:
        if path not in tensors:
            tensors[path] = ttnn.load_tensor(path, device=mesh_device)
        return tensors[path]

    return _merge(operators, weights, state, load, name="")


def _merge(
    operators: Mapping[str, Any],
    weights: Mapping[str, Any],
    state: Mapping[str, Any],
    load: Callable[[str], ttnn.Tensor],
    name: str,
) -> dict[str, Any]:
    stray = weights.keys() - operators.keys()
    if stray:
        raise DeviceError(
            f"Weights without an operation to use them: {', '.join(name + key for key in sorted(stray))}."
        )
    merged: dict[str, Any] = {}
    for key, operator in operators.items():
        where = f"{name}{key}"
        if isinstance(operator, OpConfig):
            merged[key] = _filled(operator, weights[key], load, where) if key in weights else operator
        else:
            merged[key] = _merge(operator, weights.get(key, {}), state.get(key, {}), load, f"{where}.")
    for key, value in state.items():
        if key not in operators:
            merged[key] = value
        elif isinstance(operators[key], OpConfig):
            raise DeviceError(f"{name}{key} names both an operation and a state.")
    return merged


def _filled(
    operator: OpConfig, files: str | Mapping[str, str], load: Callable[[str], ttnn.Tensor], name: str
) -> OpConfig:
    operands: dict[str, Any] = {}
    for path in [files] if isinstance(files, str) else files.values():
        operand = Path(path).name.removesuffix(SUFFIX).rpartition(".")[2]
        if operand not in operand_names(operator):
            raise DeviceError(
                f"{path}, a weight of {name}, names the operand {operand!r}, which {type(operator).__name__} does not "
                "have."
            )
        operands[operand] = load(path)
    return dataclasses.replace(operator, **operands)


def save_weight_config(directory: Path, weights: WeightConfig) -> None:
    """Writes `weights`, whose files lie under `directory`, so that another process can read it there."""
    relative = _map_paths(weights, lambda path: str(Path(path).relative_to(directory)))
    (directory / MANIFEST).write_text(json.dumps(relative, indent=1), encoding="utf-8")


def load_weight_config(directory: Path) -> WeightConfig:
    """Reads the WeightConfig that `save_weight_config` wrote, wherever the directory is now."""
    relative = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    return _map_paths(relative, lambda path: str(directory / path))


def _map_paths(weights: WeightConfig, change: Callable[[str], str]) -> WeightConfig:
    return {
        key: change(value) if isinstance(value, str) else _map_paths(value, change) for key, value in weights.items()
    }
