"""Hidden states to logits: the final norm, the choice of tokens that need logits, and the head."""

from pathlib import Path
from typing import TypedDict

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it

from stages.backend import composite, ttnn
from stages.models.deepseek_v3.rms_norm import RMSNorm, RMSNormRunConfig, RMSNormState
from stages.models.deepseek_v3.weight_specs import head_projection
from stages.models.module import COLUMNS, HeadModule, columns, matmul_kernel
from stages.run_config import (
    AllGatherConfig,
    EmbeddingConfig,
    LinearConfig,
    OperatorConfig,
    StateDict,
    WeightConfig,
    dump_weight,
)
from stages.tensor_dtypes import DEFAULT_DTYPES, WeightDtypes
from weights.model_config import HuggingFaceConfig, ModelConfig
from weights.source import PrefixView


class LMHeadState(TypedDict):
    """State of the head."""

    mesh_device: ttnn.MeshDevice
    norm: RMSNormState


class LMHeadRunConfig(TypedDict):
    """The arguments of a forward pass."""

    mesh_device: ttnn.MeshDevice
    pick: EmbeddingConfig
    norm: RMSNormRunConfig
    all_gather: AllGatherConfig
    linear: LinearConfig


class LMHead(HeadModule[LMHeadRunConfig]):
    """head(norm(x)); each column holds its part of the vocabulary, padded to equal whole tiles."""

    @classmethod
    def convert_weights(
        cls,
        hf_config: HuggingFaceConfig | ModelConfig,
        torch_state_dict: StateDict,
        output_path: Path,
        mesh_device: ttnn.MeshDevice,
        dtypes: WeightDtypes = DEFAULT_DTYPES,
    ) -> WeightConfig:
        """Writes `model.norm.weight` and `lm_head.weight` [vocabulary, hidden] of `torch_state_dict`."""
        norm = RMSNorm.convert_weights(
            hf_config, PrefixView(torch_state_dict, "model.norm."), output_path / "norm", mesh_device, dtypes
        )
        spec = head_projection(ModelConfig.from_hf(hf_config), columns(mesh_device), dtypes)
        head = torch_state_dict["lm_head.weight"]
        padding = spec.shape[-1] - head.shape[0]
        padded = F.pad(head, (0, 0, 0, padding)) if padding else head
        return {"norm": norm, "linear": dump_weight(output_path, "linear", spec, padded.t()[None, None], mesh_device)}

    @classmethod
    def prefill_model_config(
        cls, hf_config: HuggingFaceConfig | ModelConfig, mesh_device: ttnn.MeshDevice
    ) -> OperatorConfig:
        """Op configs after a prefill: only the last tokens of prompts come here."""
        return cls._model_config(ttnn.DRAM_MEMORY_CONFIG, RMSNorm.prefill_model_config(hf_config, mesh_device))

    @classmethod
    def decode_model_config(
        cls, hf_config: HuggingFaceConfig | ModelConfig, mesh_device: ttnn.MeshDevice
    ) -> OperatorConfig:
        """Op configs for one token a user: intermediate results stay in L1, logits go to DRAM."""
        return cls._model_config(ttnn.L1_MEMORY_CONFIG, RMSNorm.decode_model_config(hf_config, mesh_device))

    @classmethod
    def _model_config(cls, memory_config: ttnn.MemoryConfig, norm: OperatorConfig) -> OperatorConfig:
        return {
            "pick": EmbeddingConfig(layout=ttnn.TILE_LAYOUT, memory_config=memory_config),
            "norm": norm,
            "all_gather": AllGatherConfig(dim=3, cluster_axis=COLUMNS, memory_config=memory_config),
            "linear": LinearConfig(memory_config=ttnn.DRAM_MEMORY_CONFIG, compute_kernel_config=matmul_kernel()),
        }

    @classmethod
    def create_state(cls, hf_config: HuggingFaceConfig | ModelConfig, mesh_device: ttnn.MeshDevice) -> LMHeadState:
        """Returns the mesh, which is all of the state."""
        return {"mesh_device": mesh_device, "norm": RMSNorm.create_state(hf_config, mesh_device)}

    @classmethod
    def pick(cls, x: ttnn.Tensor, cfg: LMHeadRunConfig, indices: ttnn.Tensor) -> ttnn.Tensor:
        """Returns the hidden states of the tokens that need logits.

        x [1, 1, tokens, hidden / columns] on each chip, indices [1, n] uint32 -> [1, 1, n, hidden / columns].
        """
        table = ttnn.to_layout(ttnn.reshape(x, (x.shape[-2], x.shape[-1])), ttnn.ROW_MAJOR_LAYOUT)
        rows = ttnn.embedding(indices, table, **cfg["pick"])
        return ttnn.reshape(rows, (1, 1, indices.shape[-1], x.shape[-1]))

    @classmethod
    def forward_prefill(cls, x: ttnn.Tensor, cfg: LMHeadRunConfig) -> ttnn.Tensor:
        """x [1, 1, tokens, hidden / columns] on each chip -> [1, 1, tokens, vocabulary / columns]."""
        return cls.project(RMSNorm.forward_prefill(x, cfg["norm"]), cfg)

    @classmethod
    def project(cls, normed: ttnn.Tensor, cfg: LMHeadRunConfig) -> ttnn.Tensor:
        """normed [1, 1, tokens, hidden / columns] on each chip -> [1, 1, tokens, vocabulary / columns]."""
        return ttnn.linear(composite.all_gather(normed, **cfg["all_gather"]), **cfg["linear"])

    @classmethod
    def to_torch(
        cls, logits: ttnn.Tensor, hf_config: HuggingFaceConfig | ModelConfig, mesh_device: ttnn.MeshDevice
    ) -> torch.Tensor:
        """Returns float32 [tokens of all rows, vocabulary] on the host, without the padding."""
        shape = tuple(mesh_device.shape)
        host = ttnn.to_torch(logits, mesh_composer=ttnn.ConcatMesh2dToTensor(mesh_device, shape, (2, 3)))
        return host[0, 0, :, : ModelConfig.from_hf(hf_config).vocab_size].float()
