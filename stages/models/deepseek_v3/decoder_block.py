"""One decoder layer: attention and a feed-forward part, each behind a norm and beside a residual."""

from abc import abstractmethod
from pathlib import Path
from typing import ClassVar, TypedDict, TypeVar

from stages.backend import ttnn
from stages.backend.fused import NormBuffers
from stages.batch import DecodeBatch, PrefillBatch
from stages.models.deepseek_v3.mla import MLA, MLARunConfig, MLAState
from stages.models.deepseek_v3.mlp import MLP, MLPRunConfig, MLPState
from stages.models.deepseek_v3.moe import MoE, MoERunConfig, MoEState
from stages.models.deepseek_v3.rms_norm import RMSNorm, RMSNormRunConfig, RMSNormState
from stages.models.module import AnyDecoderModule, DecoderModule
from stages.options import CacheOptions
from stages.run_config import OperatorConfig, StateDict, WeightConfig
from stages.tensor_dtypes import DEFAULT_DTYPES, WeightDtypes
from weights.model_config import HuggingFaceConfig, ModelConfig
from weights.source import PrefixView


class DecoderBlockState(TypedDict):
    """State of a layer, under the names of a checkpoint's modules."""

    mesh_device: ttnn.MeshDevice
    input_layernorm: RMSNormState
    self_attn: MLAState
    post_attention_layernorm: RMSNormState
    mlp: MLPState | MoEState


class DecoderBlockRunConfig(TypedDict):
    """The arguments of a forward pass of any kind of layer."""

    mesh_device: ttnn.MeshDevice
    input_layernorm: RMSNormRunConfig
    self_attn: MLARunConfig
    post_attention_layernorm: RMSNormRunConfig


class DenseBlockRunConfig(DecoderBlockRunConfig):
    """The arguments of a layer with one feed-forward network."""

    mlp: MLPRunConfig


class MoEBlockRunConfig(DecoderBlockRunConfig):
    """The arguments of a layer with a mixture of experts."""

    mlp: MoERunConfig


BlockT = TypeVar("BlockT", bound=DecoderBlockRunConfig)


class DecoderBlock(DecoderModule[BlockT]):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); hidden states are sharded by column throughout."""

    feed_forward: ClassVar[type[MLP] | type[MoE]]

    @classmethod
    def convert_weights(
        cls,
        hf_config: HuggingFaceConfig | ModelConfig,
        torch_state_dict: StateDict,
        output_path: Path,
        mesh_device: ttnn.MeshDevice,
        dtypes: WeightDtypes = DEFAULT_DTYPES,
    ) -> WeightConfig:
        """Writes a layer's weights; `torch_state_dict` has the names under a checkpoint's model.layers.N.

        Raises PlanError where the model's sizes cannot be shared by the mesh.
        """
        modules = {
            "input_layernorm": RMSNorm.convert_weights,
            "self_attn": MLA.convert_weights,
            "post_attention_layernorm": RMSNorm.convert_weights,
            "mlp": cls.feed_forward.convert_weights,
        }
        return {
            name: convert(hf_config, PrefixView(torch_state_dict, f"{name}."), output_path / name, mesh_device, dtypes)
            for name, convert in modules.items()
        }

    @classmethod
    def prefill_model_config(
        cls, hf_config: HuggingFaceConfig | ModelConfig, mesh_device: ttnn.MeshDevice
    ) -> OperatorConfig:
        """Op configs for many tokens."""
        return {
            "input_layernorm": RMSNorm.prefill_model_config(hf_config, mesh_device),
            "self_attn": MLA.prefill_model_config(hf_config, mesh_device),
            "post_attention_layernorm": RMSNorm.prefill_model_config(hf_config, mesh_device),
            "mlp": cls.feed_forward.prefill_model_config(hf_config, mesh_device),
        }

    @classmethod
    def decode_model_config(
        cls, hf_config: HuggingFaceConfig | ModelConfig, mesh_device: ttnn.MeshDevice
    ) -> OperatorConfig:
        """Op configs for one token a user."""
        return {
            "input_layernorm": RMSNorm.decode_model_config(hf_config, mesh_device),
            "self_attn": MLA.decode_model_config(hf_config, mesh_device),
            "post_attention_layernorm": RMSNorm.decode_model_config(hf_config, mesh_device),
            "mlp": cls.feed_forward.decode_model_config(hf_config, mesh_device),
        }

    @classmethod
    def create_state(
        cls,
        hf_config: HuggingFaceConfig | ModelConfig,
        mesh_device: ttnn.MeshDevice,
        cache: CacheOptions,
        dtypes: WeightDtypes = DEFAULT_DTYPES,
    ) -> DecoderBlockState:
        """Returns the state of all parts, with a KV cache of the size that `cache` gives."""
        return {
            "mesh_device": mesh_device,
            "input_layernorm": RMSNorm.create_state(hf_config, mesh_device),
            "self_attn": MLA.create_state(hf_config, mesh_device, cache, dtypes),
            "post_attention_layernorm": RMSNorm.create_state(hf_config, mesh_device),
            "mlp": cls.feed_forward.create_state(hf_config, mesh_device),
        }

    @classmethod
    def kv_cache(cls, cfg: BlockT) -> ttnn.Tensor:
        """The cache of the layer's attention."""
        return cfg["self_attn"]["kv_cache"]

    @classmethod
    def forward_prefill(cls, x: ttnn.Tensor, cfg: BlockT, batch: PrefillBatch) -> ttnn.Tensor:
        """x [1, 1, tokens, hidden / columns] on each chip -> the same shape."""
        normed = RMSNorm.forward_prefill(x, cfg["input_layernorm"])
        x = ttnn.add(x, MLA.forward_prefill(normed, cfg["self_attn"], batch))
        normed = RMSNorm.forward_prefill(x, cfg["post_attention_layernorm"])
        return ttnn.add(x, cls._feed_forward_prefill(normed, cfg))

    @classmethod
    def forward_decode(cls, x: ttnn.Tensor, cfg: BlockT, batch: DecodeBatch) -> ttnn.Tensor:
        """x [1, 1, users, hidden / columns] on each chip -> the same shape."""
        if batch.norms is not None:
            return cls._forward_residual(x, cfg, batch, *batch.norms)
        normed = RMSNorm.forward_decode(x, cfg["input_layernorm"])
        x = ttnn.add(x, MLA.forward_decode(normed, cfg["self_attn"], batch))
        normed = RMSNorm.forward_decode(x, cfg["post_attention_layernorm"])
        return ttnn.add(x, cls._feed_forward_decode(normed, cfg))

    @classmethod
    def _forward_residual(
        cls, x: ttnn.Tensor, cfg: BlockT, batch: DecodeBatch, before: NormBuffers, behind: NormBuffers
    ) -> ttnn.Tensor:
        """The decode pass with norms of one program each, the second of which adds the attention's output to x."""
        x = ttnn.to_memory_config(x, before.memory_config)
        normed = RMSNorm.forward_residual(x, cfg["input_layernorm"], before)
        attended = MLA.forward_decode(normed, cfg["self_attn"], batch)
        normed = RMSNorm.forward_residual(attended, cfg["post_attention_layernorm"], behind, residual=x)
        return ttnn.add(x, cls._feed_forward_decode(normed, cfg), memory_config=behind.memory_config)

    @classmethod
    @abstractmethod
    def _feed_forward_prefill(cls, x: ttnn.Tensor, cfg: BlockT) -> ttnn.Tensor:
        """Runs the feed-forward part over many tokens."""

    @classmethod
    @abstractmethod
    def _feed_forward_decode(cls, x: ttnn.Tensor, cfg: BlockT) -> ttnn.Tensor:
        """Runs the feed-forward part over one token a user."""


class DenseBlock(DecoderBlock[DenseBlockRunConfig]):
    """A decoder layer with one feed-forward network: one of the first layers."""

    feed_forward = MLP

    @classmethod
    def _feed_forward_prefill(cls, x: ttnn.Tensor, cfg: DenseBlockRunConfig) -> ttnn.Tensor:
        return MLP.forward_prefill(x, cfg["mlp"])

    @classmethod
    def _feed_forward_decode(cls, x: ttnn.Tensor, cfg: DenseBlockRunConfig) -> ttnn.Tensor:
        return MLP.forward_decode(x, cfg["mlp"])


class MoEBlock(DecoderBlock[MoEBlockRunConfig]):
    """A decoder layer with a mixture of experts: one of the layers after the first ones."""

    feed_forward = MoE

    @classmethod
    def _feed_forward_prefill(cls, x: ttnn.Tensor, cfg: MoEBlockRunConfig) -> ttnn.Tensor:
        return MoE.forward_prefill(x, cfg["mlp"])

    @classmethod
    def _feed_forward_decode(cls, x: ttnn.Tensor, cfg: MoEBlockRunConfig) -> ttnn.Tensor:
        return MoE.forward_decode(x, cfg["mlp"])


def decoder_block(config: ModelConfig, layer: int) -> AnyDecoderModule:
    """Returns the kind of block that a layer is."""
    return MoEBlock if config.is_moe(layer) else DenseBlock
