"""Root mean square normalisation, of one chip's values or of hidden states shared out over the mesh's columns."""

from pathlib import Path
from typing import TypedDict

from stages.backend import composite, fused, ttnn
from stages.models.deepseek_v3.weight_specs import hidden_norm_weights
from stages.models.module import COLUMNS, TokenwiseModule, columns
from stages.run_config import AllGatherConfig, OperatorConfig, RMSNormConfig, StateDict, WeightConfig, dump_weight
from stages.tensor_dtypes import DEFAULT_DTYPES, WeightDtypes
from weights.model_config import HuggingFaceConfig, ModelConfig

LATENT_EPSILON = 1e-6
"""Epsilon of the norms inside attention: the default of DeepseekV3RMSNorm, whatever rms_norm_eps is."""


class RMSNormState(TypedDict):
    """State of a norm."""

    mesh_device: ttnn.MeshDevice


class RMSNormRunConfig(RMSNormState):
    """The arguments of a forward pass."""

    norm: RMSNormConfig
    all_gather_stats: AllGatherConfig


class RMSNorm(TokenwiseModule[RMSNormRunConfig]):
    """x / rms(x) * weight over hidden states that are sharded by column."""

    @classmethod
    def convert_weights(
        cls,
        hf_config: HuggingFaceConfig | ModelConfig,
        torch_state_dict: StateDict,
        output_path: Path,
        mesh_device: ttnn.MeshDevice,
        dtypes: WeightDtypes = DEFAULT_DTYPES,
    ) -> WeightConfig:
        """Writes `weight` [hidden] of `torch_state_dict`, each column its part."""
        spec = hidden_norm_weights(ModelConfig.from_hf(hf_config))["norm"]
        gains = torch_state_dict["weight"].reshape(spec.shape)
        return {"norm": dump_weight(output_path, "norm", spec, gains, mesh_device)}

    @classmethod
    def prefill_model_config(
        cls, hf_config: HuggingFaceConfig | ModelConfig, mesh_device: ttnn.MeshDevice
    ) -> OperatorConfig:
        """Op configs for many tokens: results go to DRAM."""
        return cls._model_config(ModelConfig.from_hf(hf_config), ttnn.DRAM_MEMORY_CONFIG)

    @classmethod
    def decode_model_config(
        cls, hf_config: HuggingFaceConfig | ModelConfig, mesh_device: ttnn.MeshDevice
    ) -> OperatorConfig:
        """Op configs for one token a user: results stay in L1."""
        return cls._model_config(ModelConfig.from_hf(hf_config), ttnn.L1_MEMORY_CONFIG)

    @classmethod
    def _model_config(cls, config: ModelConfig, memory_config: ttnn.MemoryConfig) -> OperatorConfig:
        return {
            "norm": RMSNormConfig(epsilon=config.rms_norm_eps, memory_config=memory_config),
            "all_gather_stats": AllGatherConfig(dim=3, cluster_axis=COLUMNS, memory_config=memory_config),
        }

    @classmethod
    def create_state(cls, hf_config: HuggingFaceConfig | ModelConfig, mesh_device: ttnn.MeshDevice) -> RMSNormState:
        """Returns the mesh, which is all of the state."""
        return {"mesh_device": mesh_device}

    @classmethod
    def forward_prefill(cls, x: ttnn.Tensor, cfg: RMSNormRunConfig) -> ttnn.Tensor:
        """x [1, 1, tokens, hidden / columns] on each chip -> the same shape."""
        if columns(cfg["mesh_device"]) == 1:
            return ttnn.rms_norm(x, **cfg["norm"])
        stats = ttnn.rms_norm_pre_all_gather(x)
        stats = composite.all_gather(stats, **cfg["all_gather_stats"])
        return ttnn.rms_norm_post_all_gather(x, stats, **cfg["norm"])

    @classmethod
    def forward_residual(
        cls, x: ttnn.Tensor, cfg: RMSNormRunConfig, buffers: fused.NormBuffers, residual: ttnn.Tensor | None = None
    ) -> ttnn.Tensor:
        """Normalises x [1, 1, tokens, hidden / columns] plus `residual`, which becomes the sum: of one tile of tokens.

        All three lie as `buffers` say.
        """
        norm = cfg["norm"]
        return fused.residual_norm(x, buffers, epsilon=norm["epsilon"], weight=norm["weight"], residual=residual)
