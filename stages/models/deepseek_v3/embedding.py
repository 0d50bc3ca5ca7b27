"""The embedding: token ids to hidden states."""

from pathlib import Path
from typing import TypedDict

from stages.backend import ttnn
from stages.models.deepseek_v3.weight_specs import embedding_weights
from stages.models.module import TokenwiseModule, columns, share
from stages.run_config import EmbeddingConfig, OperatorConfig, StateDict, WeightConfig, dump_weight
from stages.tensor_dtypes import DEFAULT_DTYPES, WeightDtypes
from weights.model_config import HuggingFaceConfig, ModelConfig


class EmbeddingState(TypedDict):
    """State of the embedding."""

    mesh_device: ttnn.MeshDevice


class EmbeddingRunConfig(EmbeddingState):
    """The arguments of a forward pass."""

    embedding: EmbeddingConfig


class Embedding(TokenwiseModule[EmbeddingRunConfig]):
    """The table of hidden states; each column holds its part of their width."""

    @classmethod
    def convert_weights(
        cls,
        hf_config: HuggingFaceConfig | ModelConfig,
        torch_state_dict: StateDict,
        output_path: Path,
        mesh_device: ttnn.MeshDevice,
        dtypes: WeightDtypes = DEFAULT_DTYPES,
    ) -> WeightConfig:
        """Writes `weight` [vocabulary, hidden] of `torch_state_dict`.

        Raises PlanError where the hidden size cannot be shared by the columns.
        """
        config = ModelConfig.from_hf(hf_config)
        share(config.hidden_size, columns(mesh_device), "The hidden size")
        spec = embedding_weights(config, dtypes)["embedding"]
        return {"embedding": dump_weight(output_path, "embedding", spec, torch_state_dict["weight"], mesh_device)}

    @classmethod
    def prefill_model_config(
        cls, hf_config: HuggingFaceConfig | ModelConfig, mesh_device: ttnn.MeshDevice
    ) -> OperatorConfig:
        """Op configs for many tokens: results go to DRAM."""
        return cls._model_config(ttnn.DRAM_MEMORY_CONFIG)

    @classmethod
    def decode_model_config(
        cls, hf_config: HuggingFaceConfig | ModelConfig, mesh_device: ttnn.MeshDevice
    ) -> OperatorConfig:
        """Op configs for one token a user: results stay in L1."""
        return cls._model_config(ttnn.L1_MEMORY_CONFIG)

    @classmethod
    def _model_config(cls, memory_config: ttnn.MemoryConfig) -> OperatorConfig:
        return {"embedding": EmbeddingConfig(layout=ttnn.TILE_LAYOUT, memory_config=memory_config)}

    @classmethod
    def create_state(cls, hf_config: HuggingFaceConfig | ModelConfig, mesh_device: ttnn.MeshDevice) -> EmbeddingState:
        """Returns the mesh, which is all of the state."""
        return {"mesh_device": mesh_device}

    @classmethod
    def forward_prefill(cls, x: ttnn.Tensor, cfg: EmbeddingRunConfig) -> ttnn.Tensor:
        """Token ids x [1, tokens], uint32 -> [1, 1, tokens, hidden / columns] on each chip."""
        rows = ttnn.embedding(x, **cfg["embedding"])
        return ttnn.reshape(rows, (1, 1, rows.shape[-2], rows.shape[-1]))
