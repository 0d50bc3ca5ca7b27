"""The part of a model that one stage computes, loaded onto its mesh: run configs of its modules and their order."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from stages.backend import ttnn
from stages.batch import DecodeBatch, PrefillBatch
from stages.converted_weights import ConvertedWeights, ModelPart, embedding_part, head_part, layer_part, stage_parts
from stages.models.module import AnyDecoderModule, HeadModule, Module, RunConfigT, TokenwiseModule
from stages.models.registry import architecture_of
from stages.options import CacheOptions
from stages.plan import StageSpec
from stages.run_config import WeightConfig
from weights.model_config import ModelConfig

OnProgress = Callable[[int, int], None]
"""Is called with (layers loaded, layers)."""

Batch = PrefillBatch | DecodeBatch


class HiddenStates(NamedTuple):
    """The output of a stage's layers for a step: `x` [1, 1, tokens, hidden / columns] on each chip of the mesh.

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
class Layer:
    """A decoder layer that is ready to run."""

    block: AnyDecoderModule
    configs: RunConfigs[Any]

    @property
    def kv_cache(self) -> ttnn.Tensor:
        """The layer's KV cache, which both modes share."""
        return self.block.kv_cache(self.configs.decode)

    def forward(self, x: ttnn.Tensor, batch: Batch) -> ttnn.Tensor:
        """x [1, 1, tokens, hidden / columns] on each chip -> the same shape."""
        if isinstance(batch, PrefillBatch):
            return self.block.forward_prefill(x, self.configs.prefill, batch)
        return self.block.forward_decode(x, self.configs.decode, batch)


ModuleT = TypeVar("ModuleT", bound=TokenwiseModule[Any])


@dataclasses.dataclass(frozen=True)
class End(Generic[ModuleT]):
    """A module at one end of the model that is ready to run: the embedding or the head."""

    module: type[ModuleT]
    configs: RunConfigs[Any]

    def forward(self, x: ttnn.Tensor, batch: Batch) -> ttnn.Tensor:
        """Runs the module on the tokens of a batch; shapes are those of the module."""
        if isinstance(batch, PrefillBatch):
            return self.module.forward_prefill(x, self.configs.prefill)
        return self.module.forward_decode(x, self.configs.decode)


@dataclasses.dataclass(frozen=True)
class ModelSlice:
    """A stage's modules; only the first stage has an `embedding`, and only the last one a `head`."""

    embedding: End[TokenwiseModule[Any]] | None
    layers: list[Layer]
    head: End[HeadModule[Any]] | None

    @classmethod
    def load(
        cls, spec: StageSpec, weights: ConvertedWeights, cache: CacheOptions, on_progress: OnProgress
    ) -> "ModelSlice":
        """Loads the modules of a stage, converting the weights that the cache does not have.

        Raises CheckpointError, before anything is converted, where a tensor is missing or has the wrong shape.
        """
        config = weights.source.config
        weights.source.validate(*(prefix for part in stage_parts(config, spec) for prefix in part.prefixes))
        modules = architecture_of(config).load_modules()
        on_progress(0, len(spec.layers))
        embedding = _end(modules.embedding, embedding_part(config), weights) if spec.is_first else None
        layers: list[Layer] = []
        for layer in spec.layers:
            layers.append(_layer(modules.decoder(config, layer), layer, weights, cache))
            on_progress(len(layers), len(spec.layers))
        head = _end(modules.head, head_part(config), weights) if spec.is_last else None
        return cls(embedding, layers, head)

    def enter(self, inputs: ttnn.Tensor, batch: Batch) -> ttnn.Tensor:
        """Returns the input of the layers, [1, 1, tokens, hidden / columns] on each chip.

        `inputs` are just that, but for the first stage, where they are token ids [1, tokens], uint32.
        """
        return inputs if self.embedding is None else self.embedding.forward(inputs, batch)

    def forward(self, x: ttnn.Tensor, batch: Batch) -> ttnn.Tensor:
        """Runs all layers: x [1, 1, tokens, hidden / columns] on each chip -> the same shape."""
        for layer in self.layers:
            x = layer.forward(x, batch)
        return x

    def logits(self, x: ttnn.Tensor, batch: Batch, indices: ttnn.Tensor | None) -> ttnn.Tensor:
        """Returns logits [1, 1, n, vocabulary / columns] of the tokens `indices` [1, n], or of all; last stage only."""
        if self.head is None:
            raise RuntimeError("only the last stage has a head")
        configs = self.head.configs
        config = configs.prefill if isinstance(batch, PrefillBatch) else configs.decode
        chosen = x if indices is None else self.head.module.pick(x, config, indices)
        return self.head.forward(chosen, batch)


def _end(module: type[ModuleT], part: ModelPart, weights: ConvertedWeights) -> End[ModuleT]:
    config = weights.source.config
    files = weights.load(part)
    return End(module, _run_configs(module, config, files, module.create_state(config, weights.mesh_device)))


def _layer(block: AnyDecoderModule, layer: int, weights: ConvertedWeights, cache: CacheOptions) -> Layer:
    config = weights.source.config
    # The state first: a model that it refuses need not be converted.
    state = block.create_state(config, weights.mesh_device, cache, weights.dtypes)
    return Layer(block, _run_configs(block, config, weights.load(layer_part(config, layer)), state))


def _run_configs(
    module: type[Module[RunConfigT]], config: ModelConfig, files: WeightConfig, state: Mapping[str, Any]
) -> RunConfigs[RunConfigT]:
    mesh_device = state["mesh_device"]
    loaded: dict[str, ttnn.Tensor] = {}
    return RunConfigs(
        prefill=module.run_config(module.prefill_model_config(config, mesh_device), files, state, loaded),
        decode=module.run_config(module.decode_model_config(config, mesh_device), files, state, loaded),
    )
