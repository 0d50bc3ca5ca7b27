"""The SwiGLU feed-forward network of dense layers and of the shared experts of a mixture."""

from pathlib import Path
from typing import TypedDict

from stages.backend import composite, ttnn
from stages.models.deepseek_v3.weight_specs import mlp_weights
from stages.models.module import COLUMNS, TokenwiseModule, columns, matmul_kernel, share, transposed
from stages.run_config import (
    AllGatherConfig,
    LinearConfig,
    MulConfig,
    OperatorConfig,
    ReduceScatterConfig,
    StateDict,
    WeightConfig,
    dump_weight,
)
from stages.tensor_dtypes import DEFAULT_DTYPES, WeightDtypes
from weights.model_config import HuggingFaceConfig, ModelConfig

PROJECTIONS = {"w1": "gate_proj.weight", "w3": "up_proj.weight", "w2": "down_proj.weight"}
"""The names of the operations' weights in a checkpoint."""


class MLPState(TypedDict):
    """State of an MLP."""

    mesh_device: ttnn.MeshDevice


class MLPRunConfig(MLPState):
    """The arguments of a forward pass: w1 gates, w3 goes up, w2 comes down."""

    all_gather: AllGatherConfig
    w1: LinearConfig
    w3: LinearConfig
    mul_activation: MulConfig
    w2: LinearConfig
    reduce_scatter: ReduceScatterConfig


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
        inner, hidden = torch_state_dict["gate_proj.weight"].shape
        share(inner, columns(mesh_device), "The feed-forward width")
        specs = mlp_weights(hidden, inner, dtypes)
        return {
            operation: dump_weight(
                output_path, operation, specs[operation], transposed(torch_state_dict, name), mesh_device
            )
            for operation, name in PROJECTIONS.items()
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
            "mul_activation": MulConfig(
                input_tensor_a_activations=[ttnn.UnaryOpType.SILU], memory_config=memory_config
            ),
            "w2": linear,
            "reduce_scatter": ReduceScatterConfig(dim=3, cluster_axis=COLUMNS, memory_config=memory_config),
        }

    @classmethod
    def create_state(cls, hf_config: HuggingFaceConfig | ModelConfig, mesh_device: ttnn.MeshDevice) -> MLPState:
        """Returns the mesh, which is all of the state."""
        return {"mesh_device": mesh_device}

    @classmethod
    def forward_prefill(cls, x: ttnn.Tensor, cfg: MLPRunConfig) -> ttnn.Tensor:
        """x [1, 1, tokens, hidden / columns] on each chip -> the same shape."""
        whole = composite.all_gather(x, **cfg["all_gather"])
        return composite.reduce_scatter(cls.forward_partial(whole, cfg), **cfg["reduce_scatter"])

    @classmethod
    def forward_partial(cls, x: ttnn.Tensor, cfg: MLPRunConfig) -> ttnn.Tensor:
        """x [1, 1, tokens, hidden] -> the same shape: each column's part of a sum over columns."""
        gate = ttnn.linear(x, **cfg["w1"])
        up = ttnn.linear(x, **cfg["w3"])
        return ttnn.linear(ttnn.mul(gate, up, **cfg["mul_activation"]), **cfg["w2"])
