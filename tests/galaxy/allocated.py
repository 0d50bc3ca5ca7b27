"""Weights that are allocated on chips and never written, which need neither memory of the host nor conversion."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from stages.backend import ttnn
from stages.converted_weights import ConvertedWeights, ModelPart
from stages.models.architecture import WeightSpec, WeightSpecs
from stages.run_config import FLOATS, WeightConfig, layout_of, weight_path


def allocate(
    specs: WeightSpecs, mesh: ttnn.MeshDevice, directory: Path = Path("allocated")
) -> tuple[WeightConfig, dict[str, ttnn.Tensor]]:
    """A module's weights in the form that `run_config` takes: files that do not exist, and their tensors by file."""
    files: WeightConfig = {}
    tensors: dict[str, ttnn.Tensor] = {}
    for name, spec in specs.items():
        if isinstance(spec, WeightSpec):
            path = str(weight_path(directory, name, spec.operand))
            files[name], tensors[path] = path, empty(spec, mesh)
        else:
            files[name], below = allocate(spec, mesh, directory / name)
            tensors |= below
    return files, tensors


def empty(spec: WeightSpec, mesh: ttnn.MeshDevice) -> ttnn.Tensor:
    """Allocates one weight."""
    rows, columns = tuple(mesh.shape)
    shape = spec.on_chip(rows, columns)
    return ttnn.empty(shape, dtype=FLOATS[spec.dtype], layout=layout_of(spec), device=mesh)


def run_config(module: Any, mode: str, specs: WeightSpecs, config: Any, state: Mapping[str, Any]) -> Any:
    """A module's run config for "prefill" or "decode", with the weights that `specs` describe."""
    mesh = state["mesh_device"]
    files, tensors = allocate(specs, mesh)
    return module.run_config(getattr(module, f"{mode}_model_config")(config, mesh), files, state, tensors)


def allocate_in_place_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes stages allocate their weights from here on, without converting and loading them."""
    waiting: dict[str, ttnn.Tensor] = {}

    def load(weights: ConvertedWeights, part: ModelPart) -> WeightConfig:
        specs = part.specs(weights.source.config, weights.mesh_device.shape[1], weights.dtypes)
        files, tensors = allocate(specs, weights.mesh_device, Path(part.name))
        waiting.update(tensors)
        return files

    def load_tensor(path: str, *, device: ttnn.MeshDevice) -> ttnn.Tensor:
        tensor = waiting.pop(path)
        assert tensor.device().shape == device.shape
        return tensor

    monkeypatch.setattr(ConvertedWeights, "load", load)
    monkeypatch.setattr(ttnn, "load_tensor", load_tensor)
