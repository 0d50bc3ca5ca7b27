"""Joins what the three stages of a module made: op configs, weight files and state become one config to run with."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch

from stages.backend import ttnn
from stages.dtypes import FLOATS
from stages.errors import DeviceError
from stages.models.deepseek_v3.weight_specs import WeightSpec
from stages.op_configs import OpConfig, operand_names

WeightConfig: TypeAlias = "dict[str, str | WeightConfig]"
"""Operation name -> path of its weight file, or paths by operand; a submodule's name -> its own WeightConfig."""

OperatorConfig: TypeAlias = "dict[str, OpConfig | OperatorConfig]"
"""Operation name -> how to call it; a submodule's name -> its own OperatorConfig."""

StateDict: TypeAlias = Mapping[str, torch.Tensor]
"""Names of a module's tensors, relative to it, -> tensors as torch stores them."""

SUFFIX = ".tensorbin"
MANIFEST = "weight_config.json"


def weight_path(directory: Path, operation: str, operand: str) -> Path:
    """The file of a weight: its middle part names the operand of the op that it fills."""
    return directory / f"{operation}.{operand}{SUFFIX}"


def dump_weight(
    directory: Path, operation: str, spec: WeightSpec, weight: torch.Tensor, mesh_device: ttnn.MeshDevice
) -> str:
    """Writes one tensor for a mesh and returns its path in `directory`. The file holds the shards of every chip.

    Raises DeviceError where `weight` has not the shape that `spec` gives it.
    """
    if tuple(weight.shape) != spec.shape:
        raise DeviceError(f"{operation}.{spec.operand} is {list(spec.shape)}, not {list(weight.shape)}.")
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
    """What shares a weight out over the chips."""
    if spec.all_chips is not None:
        return ttnn.ShardTensorToMesh(mesh_device, dim=spec.all_chips)
    return ttnn.ShardTensor2dMesh(mesh_device, tuple(mesh_device.shape), spec.dims)


def merge_run_config(
    operators: Mapping[str, Any],
    weights: Mapping[str, Any],
    state: Mapping[str, Any],
    loaded: dict[str, ttnn.Tensor] | None = None,
) -> dict[str, Any]:
    """Op configs with their weights loaded onto the mesh, beside the state.

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
    """The WeightConfig that `save_weight_config` wrote, wherever the directory now lies."""
    relative = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    return _map_paths(relative, lambda path: str(directory / path))


def _map_paths(weights: WeightConfig, change: Callable[[str], str]) -> WeightConfig:
    return {
        key: change(value) if isinstance(value, str) else _map_paths(value, change) for key, value in weights.items()
    }


class SubStateDict(Mapping[str, torch.Tensor]):
    """The tensors under a prefix, read only when asked for."""

    def __init__(self, state_dict: StateDict, prefix: str) -> None:
        self._state_dict = state_dict
        self._prefix = prefix

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._state_dict[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._state_dict if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)
