"""The SwiGLU feed-forward network of dense layers and of the shared experts of a mixture."""

from pathlib import Path
from typing import TypedDict

import torch

from stages.backend import composite, fused, ttnn
from stages.models.deepseek_v3.weight_specs import OUTPUTS, mlp_weights
from stages.models.module import COLUMNS, TokenwiseModule, columns, matmul_kernel, share, transposed
from stages.run_config import (
    AllGatherConfig,
    GatheredLinearConfig,
    LinearConfig,
    MulConfig,
    OperatorConfig,
    StateDict,
    WeightConfig,
    dump_weight,
)
from stages.tensor_dtypes import DEFAULT_DTYPES, TILE, WeightDtypes
from weights.model_config import HuggingFaceConfig, ModelConfig

PROJECTIONS = {"w1": "gate_proj.weight", "w3": "up_proj.weight", "w2": "down_proj.weight"}
"""The names of the operations' weights in a checkpoint."""


class MLPState(TypedDict):
    """State of an MLP: the semaphores of its two products of gathered inputs."""

    mesh_device: ttnn.MeshDevice
    up_semaphores: fused.Semaphores
    down_semaphores: fused.Semaphores


class MLPRunConfig(MLPState):
    """The arguments of a forward pass: w1 gates, w3 goes up, w13 is both, w2 comes down."""

    all_gather: AllGatherConfig
    w1: LinearConfig
    w3: LinearConfig
    w13: GatheredLinearConfig
    mul_activation: MulConfig
    w2: LinearConfig


class MLP(TokenwiseModule[MLPRunConfig]):
    """down(silu(gate(x)) * up(x)), its inner width shared out over the mesh's columns."""

    @classmethod
    def convert_weights(
        cls,
        hf_config: HuggingFaceConfig | ModelConfig,
        torch_state_dict: StateDict,
        output_path: Path,
        mesh_device: ttnn.MeshDevice,
        dtypes: WeightDtypes = DEFAULT_DTYPES,
    ) -> WeightConfig:
        """Writes gate_proj, up_proj and down_proj of `torch_state_dict` under `output_path`.

        Raises PlanError where the inner width cannot be shared by the columns.
        """
        return cls.convert(torch_state_dict, output_path, mesh_device, dtypes, down=OUTPUTS)

    @classmethod
    def convert(
        cls,
        state_dict: StateDict,
        output_path: Path,
        mesh_device: ttnn.MeshDevice,
        dtypes: WeightDtypes,
        *,
        down: int,
    ) -> WeightConfig:
        """Writes the weights with w2 shared along the dimension `down`, as `mlp_weights` has it."""
        inner, hidden = state_dict["gate_proj.weight"].shape
        share(inner, columns(mesh_device), "The feed-forward width")
        return {
            operation: dump_weight(
                output_path,
                operation,
                spec,
                paired(state_dict) if operation == "w13" else transposed(state_dict, PROJECTIONS[operation]),
                mesh_device,
            )
            for operation, spec in mlp_weights(hidden, inner, dtypes, down=down).items()
        }

    @classmethod
    def prefill_model_config(
        cls, hf_config: HuggingFaceConfig | ModelConfig, mesh_device: ttnn.MeshDevice
    ) -> OperatorConfig:
        """Op configs for many tokens: intermediate results go to DRAM."""
        return cls._model_config(ttnn.DRAM_MEMORY_CONFIG)

    @classmethod
    def decode_model_config(
        cls, hf_config: HuggingFaceConfig | ModelConfig, mesh_device: ttnn.MeshDevice
    ) -> OperatorConfig:
        """Op configs for one token a user: intermediate results stay in L1."""
        return cls._model_config(ttnn.L1_MEMORY_CONFIG)

    @classmethod
    def _model_config(cls, memory_config: ttnn.MemoryConfig) -> OperatorConfig:
        linear = LinearConfig(memory_config=memory_config, compute_kernel_config=matmul_kernel())
        return {
            "all_gather": AllGatherConfig(dim=3, cluster_axis=COLUMNS, memory_config=memory_config),
            "w1": linear,
            "w3": linear,
            "w13": GatheredLinearConfig(
                fuse_swiglu=True, memory_config=memory_config, compute_kernel_config=matmul_kernel()
            ),
            "mul_activation": MulConfig(
                input_tensor_a_activations=[ttnn.UnaryOpType.SILU], memory_config=memory_config
            ),
            "w2": linear,
        }

    @classmethod
    def create_state(cls, hf_config: HuggingFaceConfig | ModelConfig, mesh_device: ttnn.MeshDevice) -> MLPState:
        """Returns the semaphores of the products."""
        return {
            "mesh_device": mesh_device,
            "up_semaphores": fused.semaphores(mesh_device),
            "down_semaphores": fused.semaphores(mesh_device),
        }

    @classmethod
    def forward_prefill(cls, x: ttnn.Tensor, cfg: MLPRunConfig) -> ttnn.Tensor:
        """x [1, 1, tokens, hidden / columns] on each chip -> the same shape."""
        if cfg["w13"].input_tensor_b is None:
            hidden = cls._gated(composite.all_gather(x, **cfg["all_gather"]), cfg)
        else:
            [hidden] = fused.gathered_linear(x, cfg["up_semaphores"], **cfg["w13"])
        [output] = fused.gathered_linear(hidden, cfg["down_semaphores"], **cfg["w2"])
        return output

    @classmethod
    def forward_partial(cls, x: ttnn.Tensor, cfg: MLPRunConfig) -> ttnn.Tensor:
        """x [1, 1, tokens, hidden] -> the same shape: each column's part of a sum over columns."""
        if cfg["w13"].input_tensor_b is None:
            return ttnn.linear(cls._gated(x, cfg), **cfg["w2"])
        [hidden] = fused.gathered_linear(x, [], **cfg["w13"])
        return ttnn.linear(hidden, **cfg["w2"])

    @classmethod
    def _gated(cls, x: ttnn.Tensor, cfg: MLPRunConfig) -> ttnn.Tensor:
        return ttnn.mul(ttnn.linear(x, **cfg["w1"]), ttnn.linear(x, **cfg["w3"]), **cfg["mul_activation"])


def paired(state_dict: StateDict) -> torch.Tensor:
    """gate_proj and up_proj as one, [1, 1, in, 2 * inner]: pairs of tiles of columns, a gate's and one that goes up."""
    both = [state_dict[PROJECTIONS[name]] for name in ("w1", "w3")]
    pairs = torch.stack([weight.view(-1, TILE, weight.shape[1]) for weight in both], dim=1)
    return pairs.view(-1, both[0].shape[1]).t()[None, None]
