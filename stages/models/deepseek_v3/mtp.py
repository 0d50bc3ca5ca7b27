"""The multi-token-prediction layer, which predicts the token after the next one (arXiv:2412.19437, 2.2).

At position i it joins the embedding of token i + 1 with the last decoder layer's hidden state and runs a decoder layer
over the result; the model's own head then predicts token i + 2.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch

from stages.backend import composite, ttnn
from stages.batch import DecodeBatch, PrefillBatch
from stages.models.deepseek_v3.decoder_block import decoder_block
from stages.models.deepseek_v3.rms_norm import RMSNorm, RMSNormRunConfig, RMSNormState
from stages.models.deepseek_v3.weight_specs import draft_projection
from stages.models.module import COLUMNS, AnyDecoderModule, DraftModule, columns, matmul_kernel, share, transposed
from stages.options import CacheOptions
from stages.run_config import (
    LinearConfig,
    OperatorConfig,
    ReduceScatterConfig,
    StateDict,
    WeightConfig,
    dump_weight,
)
from stages.tensor_dtypes import DEFAULT_DTYPES, WeightDtypes
from weights.model_config import HuggingFaceConfig, ModelConfig
from weights.source import PrefixView

NORMS = {"enorm": "enorm.", "hnorm": "hnorm.", "norm": "shared_head.norm."}
"""The layer's own norms: of embeddings, of hidden states and before the head, and where a checkpoint has them."""


class MTPState(TypedDict):
    """State of the layer; `module` is the kind of its decoder layer."""

    mesh_device: ttnn.MeshDevice
    module: AnyDecoderModule
    enorm: RMSNormState
    hnorm: RMSNormState
    block: Mapping[str, Any]
    norm: RMSNormState


class MTPRunConfig(TypedDict):
    """The arguments of a forward pass; `block` are those of `module`."""

    mesh_device: ttnn.MeshDevice
    module: AnyDecoderModule
    enorm: RMSNormRunConfig
    hnorm: RMSNormRunConfig
    eh_proj: LinearConfig
    reduce_scatter: ReduceScatterConfig
    block: Any
    norm: RMSNormRunConfig


class MTP(DraftModule[MTPRunConfig]):
    """block(eh_proj(enorm(embedding) beside hnorm(hidden))), with a norm for the head that follows."""

    @classmethod
    def convert_weights(
        cls,
        hf_config: HuggingFaceConfig | ModelConfig,
        torch_state_dict: StateDict,
        output_path: Path,
        mesh_device: ttnn.MeshDevice,
        dtypes: WeightDtypes = DEFAULT_DTYPES,
    ) -> WeightConfig:
        """Writes the layer's weights; `torch_state_dict` has the names under a checkpoint's model.layers.N.

        Raises PlanError where the model's sizes cannot be shared by the mesh.
        """
        config = ModelConfig.from_hf(hf_config)
        share(config.hidden_size, columns(mesh_device), "The hidden size")
        files: WeightConfig = {
            name: RMSNorm.convert_weights(
                config, PrefixView(torch_state_dict, prefix), output_path / name, mesh_device, dtypes
            )
            for name, prefix in NORMS.items()
        }
        projection = by_column(transposed(torch_state_dict, "eh_proj.weight"), columns(mesh_device))
        spec = draft_projection(config, dtypes)
        files["eh_proj"] = dump_weight(output_path, "eh_proj", spec, projection, mesh_device)
        block = _module(config)
        files["block"] = block.convert_weights(config, torch_state_dict, output_path / "block", mesh_device, dtypes)
        return files

    @classmethod
    def prefill_model_config(
        cls, hf_config: HuggingFaceConfig | ModelConfig, mesh_device: ttnn.MeshDevice
    ) -> OperatorConfig:
        """Op configs for many tokens: intermediate results go to DRAM."""
        config = ModelConfig.from_hf(hf_config)
        return {
            **cls._model_config(ttnn.DRAM_MEMORY_CONFIG),
            **{name: RMSNorm.prefill_model_config(config, mesh_device) for name in NORMS},
            "block": _module(config).prefill_model_config(config, mesh_device),
        }

    @classmethod
    def decode_model_config(
        cls, hf_config: HuggingFaceConfig | ModelConfig, mesh_device: ttnn.MeshDevice
    ) -> OperatorConfig:
        """Op configs for one token a lane: intermediate results stay in L1."""
        config = ModelConfig.from_hf(hf_config)
        return {
            **cls._model_config(ttnn.L1_MEMORY_CONFIG),
            **{name: RMSNorm.decode_model_config(config, mesh_device) for name in NORMS},
            "block": _module(config).decode_model_config(config, mesh_device),
        }

    @classmethod
    def _model_config(cls, memory_config: ttnn.MemoryConfig) -> OperatorConfig:
        return {
            "eh_proj": LinearConfig(memory_config=memory_config, compute_kernel_config=matmul_kernel()),
            "reduce_scatter": ReduceScatterConfig(dim=3, cluster_axis=COLUMNS, memory_config=memory_config),
        }

    @classmethod
    def create_state(
        cls,
        hf_config: HuggingFaceConfig | ModelConfig,
        mesh_device: ttnn.MeshDevice,
        cache: CacheOptions,
        dtypes: WeightDtypes = DEFAULT_DTYPES,
    ) -> MTPState:
        """Returns the state of all parts, with a KV cache of the size that `cache` gives.

        Raises PlanError where attention cannot run on the mesh.
        """
        config = ModelConfig.from_hf(hf_config)
        module = _module(config)
        return {
            "mesh_device": mesh_device,
            "module": module,
            "enorm": RMSNorm.create_state(config, mesh_device),
            "hnorm": RMSNorm.create_state(config, mesh_device),
            "block": module.create_state(config, mesh_device, cache, dtypes),
            "norm": RMSNorm.create_state(config, mesh_device),
        }

    @classmethod
    def kv_cache(cls, cfg: MTPRunConfig) -> ttnn.Tensor:
        """The cache of the layer's attention."""
        return cfg["module"].kv_cache(cfg["block"])

    @classmethod
    def forward_prefill(
        cls, hidden: ttnn.Tensor, following: ttnn.Tensor, cfg: MTPRunConfig, batch: PrefillBatch
    ) -> ttnn.Tensor:
        """Both inputs [1, 1, tokens, hidden / columns] on each chip -> the same shape.

        `following` are the embeddings of the tokens that follow those of `hidden`.
        """
        return cfg["module"].forward_prefill(cls._joined(hidden, following, cfg), cfg["block"], batch)

    @classmethod
    def forward_decode(
        cls, hidden: ttnn.Tensor, following: ttnn.Tensor, cfg: MTPRunConfig, batch: DecodeBatch
    ) -> ttnn.Tensor:
        """Both inputs [1, 1, lanes, hidden / columns] on each chip -> the same shape, as in `forward_prefill`."""
        x: ttnn.Tensor = cfg["module"].forward_decode(cls._joined(hidden, following, cfg), cfg["block"], batch)
        return batch.interleaved(x)

    @classmethod
    def norm(cls, x: ttnn.Tensor, cfg: MTPRunConfig) -> ttnn.Tensor:
        """x [1, 1, tokens, hidden / columns] on each chip -> the same shape, as the head takes it."""
        return RMSNorm.forward_prefill(x, cfg["norm"])

    @classmethod
    def _joined(cls, hidden: ttnn.Tensor, following: ttnn.Tensor, cfg: MTPRunConfig) -> ttnn.Tensor:
        """Projects both inputs to one: each chip multiplies its columns of both, and the products are added."""
        parts = [RMSNorm.forward_prefill(following, cfg["enorm"]), RMSNorm.forward_prefill(hidden, cfg["hnorm"])]
        partial = ttnn.linear(ttnn.concat(parts, dim=-1), **cfg["eh_proj"])
        return composite.reduce_scatter(partial, **cfg["reduce_scatter"])


def by_column(projection: torch.Tensor, parts: int) -> torch.Tensor:
    """The rows of [1, 1, 2 * hidden, hidden] so that each of `parts` columns finds those of its values side by side.

    A column has a part of the embedding's values and the same part of the hidden state's, which lie `hidden` apart.
    """
    _, _, inputs, outputs = projection.shape
    halves = projection.reshape(2, parts, inputs // 2 // parts, outputs)
    return halves.transpose(0, 1).reshape(1, 1, inputs, outputs)


def _module(config: ModelConfig) -> AnyDecoderModule:
    """The kind of the decoder layer, which comes after all others."""
    return decoder_block(config, config.num_hidden_layers)
