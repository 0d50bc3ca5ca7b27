"""The experts of a chip as one feed-forward network: their weights side by side, and then the column's shared ones."""

from collections.abc import Iterator

import torch

from stages.backend import mixture, ttnn
from stages.models.deepseek_v3.mlp import PROJECTIONS, paired
from stages.models.deepseek_v3.weight_specs import shared_width
from stages.run_config import StateDict
from stages.tensor_dtypes import TILE
from weights.model_config import ModelConfig
from weights.source import PrefixView


def stacked_expert(config: ModelConfig, state_dict: StateDict, operand: str, rows: int, columns: int) -> torch.Tensor:
    """w13 or w2 of all chips of a mesh, [1, 1, in, out], chip by chip in row-major order.

    It is filled expert by expert, so that no second copy of all of them is ever held. The dtype is that of the
    checkpoint's values, or float32 for FP8 values times a scale.
    """
    first = _block(PrefixView(state_dict, "experts.0."), operand)
    experts, shared = config.n_routed_experts, shared_width(config)
    factor = 2 if operand == "w13" else 1
    height = experts * first.shape[0] + rows * factor * shared
    stack = torch.empty(height, first.shape[1], dtype=first.dtype)
    begin = 0
    for block in _blocks(config, state_dict, operand, rows, columns):
        stack[begin : begin + block.shape[0]] = block
        begin += block.shape[0]
    return stack.t()[None, None] if operand == "w13" else stack[None, None]


def stacked_selection(config: ModelConfig, mesh_device: ttnn.MeshDevice) -> ttnn.Tensor:
    """What takes weights by expert to those of a chip's own inner values, made on the chips themselves."""
    rows, columns = tuple(mesh_device.shape)
    experts, chips = config.n_routed_experts, rows * columns
    small = torch.zeros(1, chips, experts + TILE, experts // chips + 1)
    for expert in range(experts):
        chip, own = divmod(expert, experts // chips)
        small[0, chip, expert, own] = 1
    small[:, :, experts, -1] = 1
    on_chips = ttnn.from_torch(
        small,
        dtype=ttnn.bfloat16,
        layout=ttnn.TILE_LAYOUT,
        device=mesh_device,
        mesh_mapper=ttnn.ShardTensorToMesh(mesh_device, dim=1),
    )
    return mixture.expert_selection(on_chips, config.moe_intermediate_size, shared_width(config) // columns)


def _blocks(
    config: ModelConfig, state_dict: StateDict, operand: str, rows: int, columns: int
) -> Iterator[torch.Tensor]:
    """The rows of each expert, and behind those of a chip its column's part of the shared ones'."""
    each = config.n_routed_experts // (rows * columns)
    shared = _block(PrefixView(state_dict, "shared_experts."), operand).chunk(columns)
    for chip in range(rows * columns):
        for expert in range(chip * each, (chip + 1) * each):
            yield _block(PrefixView(state_dict, f"experts.{expert}."), operand)
        yield shared[chip % columns]


def _block(state_dict: StateDict, operand: str) -> torch.Tensor:
    """One network's part of an operand, with its inner values as rows: [2 * inner or inner, hidden]."""
    return paired(state_dict)[0, 0].t() if operand == "w13" else state_dict[PROJECTIONS["w2"]].t()
