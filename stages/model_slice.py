"""The part of a model that one stage computes, loaded onto its mesh: run configs of its modules and their order."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple

from stages.backend import ttnn
from stages.batch import DecodeBatch, PrefillBatch
from stages.converted_weights import EMBEDDING, HEAD, ConvertedWeights, layer_part, stage_parts
from stages.models.deepseek_v3.decoder_block import (
    BlockT,
    DecoderBlock,
    DenseBlock,
    DenseBlockRunConfig,
    MoEBlock,
    MoEBlockRunConfig,
)
from stages.models.deepseek_v3.embedding import Embedding, EmbeddingRunConfig
from stages.models.deepseek_v3.lm_head import LMHead, LMHeadRunConfig
from stages.models.module import Module, RunConfigT
from stages.options import CacheOptions
from stages.plan import StageSpec
from stages.run_config import WeightConfig
from weights.model_config import ModelConfig

OnProgress = Callable[[int, int], None]
"""Called with (layers loaded, layers)."""

Batch = PrefillBatch | DecodeBatch


class HiddenStates(NamedTuple):
    """What a stage's layers give for a step: `x` [1, 1, tokens, hidden / columns] on each chip of the mesh.

    `logits` [1, 1, tokens, vocabulary / columns] are those of all tokens, where they were computed with them.
    """

    x: ttnn.Tensor
    batch: Batch
    logits: ttnn.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class RunConfigs(Generic[RunConfigT]):
    """A module's run configs for both modes; they share weights and state."""

    prefill: RunConfigT
    decode: RunConfigT


@dataclasses.dataclass(frozen=True)
class Layer(Generic[BlockT]):
    """A decoder layer that is ready to run."""

    block: type[DecoderBlock[BlockT]]
    configs: RunConfigs[BlockT]

    def forward(self, x: ttnn.Tensor, batch: Batch) -> ttnn.Tensor:
        """x [1, 1, tokens, hidden / columns] on each chip -> the same shape."""
        if isinstance(batch, PrefillBatch):
            return self.block.forward_prefill(x, self.configs.prefill, batch)
        return self.block.forward_decode(x, self.configs.decode, batch)


@dataclasses.dataclass(frozen=True)
class ModelSlice:
    """A stage's modules; `embedding` is the first stage's alone, `head` the last one's."""

    embedding: RunConfigs[EmbeddingRunConfig] | None
    layers: list[Layer[DenseBlockRunConfig] | Layer[MoEBlockRunConfig]]
    head: RunConfigs[LMHeadRunConfig] | None

    @classmethod
    def load(
        cls, spec: StageSpec, weights: ConvertedWeights, cache: CacheOptions, on_progress: OnProgress
    ) -> "ModelSlice":
        """Loads what `spec` asks for, converting what the weight cache does not have.

        Raises CheckpointError, before anything is converted, where a tensor is missing or has the wrong shape.
        """
        config = weights.source.config
        weights.source.validate(*(prefix for part in stage_parts(config, spec) for prefix in part.prefixes))
        mesh_device = weights.mesh_device
        on_progress(0, len(spec.layers))
        embedding = _embedding(config, weights, mesh_device) if spec.is_first else None
        layers: list[Layer[DenseBlockRunConfig] | Layer[MoEBlockRunConfig]] = []
        for layer in spec.layers:
            if config.is_moe(layer):
                layers.append(_layer(MoEBlock, layer, config, weights, cache))
            else:
                layers.append(_layer(DenseBlock, layer, config, weights, cache))
            on_progress(len(layers), len(spec.layers))
        head = _head(config, weights, mesh_device) if spec.is_last else None
        return cls(embedding, layers, head)

    def enter(self, inputs: ttnn.Tensor, batch: Batch) -> ttnn.Tensor:
        """What the layers start from, [1, 1, tokens, hidden / columns] on each chip.

        `inputs` are just that, but for the first stage, where they are token ids [1, tokens], uint32.
        """
        if self.embedding is None:
            return inputs
        if isinstance(batch, PrefillBatch):
            return Embedding.forward_prefill(inputs, self.embedding.prefill)
        return Embedding.forward_decode(inputs, self.embedding.decode)

    def forward(self, x: ttnn.Tensor, batch: Batch) -> ttnn.Tensor:
        """Hidden states through all layers: x [1, 1, tokens, hidden / columns] on each chip -> the same shape."""
        for layer in self.layers:
            x = layer.forward(x, batch)
        return x

    def logits(self, x: ttnn.Tensor, batch: Batch, indices: ttnn.Tensor | None) -> ttnn.Tensor:
        """[1, 1, n, vocabulary / columns] for the tokens `indices` [1, n], or for all. Last stage only."""
        if self.head is None:
            raise RuntimeError("only the last stage has a head")
        config = self.head.prefill if isinstance(batch, PrefillBatch) else self.head.decode
        picked = x if indices is None else LMHead.pick(x, config, indices)
        if isinstance(batch, PrefillBatch):
            return LMHead.forward_prefill(picked, config)
        return LMHead.forward_decode(picked, config)


def _embedding(
    config: ModelConfig, weights: ConvertedWeights, mesh_device: ttnn.MeshDevice
) -> RunConfigs[EmbeddingRunConfig]:
    files = weights.load(EMBEDDING)
    return _run_configs(Embedding, config, files, Embedding.create_state(config, mesh_device))


def _head(config: ModelConfig, weights: ConvertedWeights, mesh_device: ttnn.MeshDevice) -> RunConfigs[LMHeadRunConfig]:
    files = weights.load(HEAD)
    return _run_configs(LMHead, config, files, LMHead.create_state(config, mesh_device))


def _layer(
    block: type[DecoderBlock[BlockT]],
    layer: int,
    config: ModelConfig,
    weights: ConvertedWeights,
    cache: CacheOptions,
) -> Layer[BlockT]:
    # The state first: what it refuses need not be converted.
    state = block.create_state(config, weights.mesh_device, cache, weights.dtypes)
    files = weights.load(layer_part(config, layer))
    return Layer(block, _run_configs(block, config, files, state))


def _run_configs(
    module: type[Module[RunConfigT]], config: ModelConfig, files: WeightConfig, state: Mapping[str, Any]
) -> RunConfigs[RunConfigT]:
    mesh_device = state["mesh_device"]
    loaded: dict[str, ttnn.Tensor] = {}
    return RunConfigs(
        prefill=module.run_config(module.prefill_model_config(config, mesh_device), files, state, loaded),
        decode=module.run_config(module.decode_model_config(config, mesh_device), files, state, loaded),
    )
