"""The part of a model that one stage computes, loaded onto its mesh: run configs of its modules and their order."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from stages.backend import ttnn
from stages.batch import DecodeBatch, PrefillBatch
from stages.candidates import DeviceCandidates
from stages.converted_weights import (
    ConvertedWeights,
    ModelPart,
    draft_part,
    embedding_part,
    head_part,
    layer_part,
    stage_parts,
)
from stages.errors import PlanError
from stages.models.module import AnyDecoderModule, DraftModule, HeadModule, Module, Modules, RunConfigT, TokenwiseModule
from stages.models.registry import architecture_of
from stages.options import CacheOptions
from stages.plan import NO_DRAFT_LAYER, StageSpec
from stages.run_config import WeightConfig
from weights.model_config import ModelConfig

OnProgress = Callable[[int, int], None]
"""Is called with (layers loaded, layers)."""

Batch = PrefillBatch | DecodeBatch


class HiddenStates(NamedTuple):
    """The output of a stage's layers for a step: `x` [1, 1, tokens, hidden / columns] on each chip of the mesh.

    `logits` [1, 1, tokens, vocabulary / columns] are those of all tokens, where they were computed with them, and
    `candidates` what `CandidateFinder.find` has found among them, where it has.
    """

    x: ttnn.Tensor
    batch: Batch
    logits: ttnn.Tensor | None = None
    candidates: DeviceCandidates | None = None


@dataclasses.dataclass(frozen=True)
class RunConfigs(Generic[RunConfigT]):
    """A module's run configs for both modes; they share weights and state."""

    prefill: RunConfigT
    decode: RunConfigT

    def of(self, batch: Batch) -> RunConfigT:
        """Returns the run config for a batch."""
        return self.prefill if isinstance(batch, PrefillBatch) else self.decode


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
class DraftLayer:
    """The multi-token-prediction layer, ready to run, beside the model's own embedding and head, which it shares."""

    module: type[DraftModule[Any]]
    configs: RunConfigs[Any]
    embedding: End[TokenwiseModule[Any]]
    head: End[HeadModule[Any]]

    @property
    def kv_cache(self) -> ttnn.Tensor:
        """The layer's KV cache, which both modes share."""
        return self.module.kv_cache(self.configs.decode)

    def forward(self, hidden: ttnn.Tensor, ids: ttnn.Tensor, batch: Batch) -> ttnn.Tensor:
        """hidden [1, 1, tokens, hidden / columns] on each chip -> the same shape; its tokens are added to the cache.

        `hidden` is the output of the last decoder layer, or of this one for the drafts after the first. `ids`
        [1, tokens], uint32, are the tokens that follow those of the batch.
        """
        following = self.embedding.forward(ids, batch)
        if isinstance(batch, PrefillBatch):
            return self.module.forward_prefill(hidden, following, self.configs.prefill, batch)
        return self.module.forward_decode(hidden, following, self.configs.decode, batch)

    def pick(self, x: ttnn.Tensor, batch: Batch, indices: ttnn.Tensor) -> ttnn.Tensor:
        """Returns the output of `forward` for the tokens `indices` [1, n], uint32, of the batch."""
        return self.head.module.pick(x, self.head.configs.of(batch), indices)

    def logits(self, x: ttnn.Tensor, batch: Batch, indices: ttnn.Tensor | None) -> ttnn.Tensor:
        """Returns logits [1, 1, n, vocabulary / columns] of the second token after each of the tokens `indices` [1, n],
        or after all, given the output of `forward`.
        """
        chosen = x if indices is None else self.pick(x, batch, indices)
        return self.head.module.project(self.module.norm(chosen, self.configs.of(batch)), self.head.configs.of(batch))


@dataclasses.dataclass(frozen=True)
class ModelSlice:
    """A stage's modules; only the first stage has an `embedding`, and only the last one a `head`.

    The last stage also has the layer that makes drafts, where it was asked for.
    """

    embedding: End[TokenwiseModule[Any]] | None
    layers: list[Layer]
    head: End[HeadModule[Any]] | None
    draft: DraftLayer | None = None

    @classmethod
    def load(
        cls,
        spec: StageSpec,
        weights: ConvertedWeights,
        cache: CacheOptions,
        on_progress: OnProgress,
        *,
        drafts: bool = False,
    ) -> "ModelSlice":
        """Loads the modules of a stage, converting the weights that the cache does not have.

        With `drafts` the last stage has the multi-token-prediction layer too. Raises PlanError where the model has
        none, and CheckpointError, before anything is converted, where a tensor is missing or has the wrong shape.
        """
        config = weights.source.config
        if drafts and not weights.source.has_draft_layer:
            raise PlanError(NO_DRAFT_LAYER)
        parts = stage_parts(config, spec, drafts=drafts)
        weights.source.validate(*(prefix for part in parts for prefix in part.prefixes))
        modules = architecture_of(config).load_modules()
        on_progress(0, len(spec.layers))
        embedding = _end(modules.embedding, embedding_part(config), weights) if spec.is_first else None
        layers: list[Layer] = []
        for layer in spec.layers:
            layers.append(_layer(modules.decoder(config, layer), layer, weights, cache))
            on_progress(len(layers), len(spec.layers))
        head = _end(modules.head, head_part(config), weights) if spec.is_last else None
        draft = _draft_layer(modules, embedding, head, weights, cache) if drafts and head is not None else None
        return cls(embedding, layers, head, draft)

    @property
    def kv_caches(self) -> list[ttnn.Tensor]:
        """The caches of all layers, that of the draft layer last."""
        caches = [layer.kv_cache for layer in self.layers]
        return caches if self.draft is None else [*caches, self.draft.kv_cache]

    def enter(self, inputs: ttnn.Tensor, batch: Batch) -> ttnn.Tensor:
        """Returns the input of the layers, [1, 1, tokens, hidden / columns] on each chip.

        `inputs` are just that, but for the first stage, where they are token ids [1, tokens], uint32.
        """
        return inputs if self.embedding is None else self.embedding.forward(inputs, batch)

    def forward(self, x: ttnn.Tensor, batch: Batch) -> ttnn.Tensor:
        """Runs all layers: x [1, 1, tokens, hidden / columns] on each chip -> the same shape."""
        for layer in self.layers:
            x = layer.forward(x, batch)
        return x if isinstance(batch, PrefillBatch) else batch.interleaved(x)

    def logits(self, x: ttnn.Tensor, batch: Batch, indices: ttnn.Tensor | None) -> ttnn.Tensor:
        """Returns logits [1, 1, n, vocabulary / columns] of the tokens `indices` [1, n], or of all; last stage only."""
        if self.head is None:
            raise RuntimeError("only the last stage has a head")
        chosen = x if indices is None else self.head.module.pick(x, self.head.configs.of(batch), indices)
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


def _draft_layer(
    modules: Modules,
    embedding: End[TokenwiseModule[Any]] | None,
    head: End[HeadModule[Any]],
    weights: ConvertedWeights,
    cache: CacheOptions,
) -> DraftLayer:
    config, module = weights.source.config, modules.draft
    state = module.create_state(config, weights.mesh_device, cache, weights.dtypes)
    configs = _run_configs(module, config, weights.load(draft_part(config)), state)
    own = embedding or _end(modules.embedding, embedding_part(config), weights)
    return DraftLayer(module, configs, own, head)


def _run_configs(
    module: type[Module[RunConfigT]], config: ModelConfig, files: WeightConfig, state: Mapping[str, Any]
) -> RunConfigs[RunConfigT]:
    mesh_device = state["mesh_device"]
    loaded: dict[str, ttnn.Tensor] = {}
    return RunConfigs(
        prefill=module.run_config(module.prefill_model_config(config, mesh_device), files, state, loaded),
        decode=module.run_config(module.decode_model_config(config, mesh_device), files, state, loaded),
    )
