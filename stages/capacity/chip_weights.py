"""What each chip of a stage holds for a part of the model: the shapes and dtypes of its weights and of its state.

The weights are those of `weight_specs`, as a mesh of rows x columns chips shares them; they are named as their files
below a part's directory. The state is what `create_state` of stages/models/deepseek_v3/ makes.
"""

from collections.abc import Iterator

from stages.capacity.chip_tensor import ChipTensor
from stages.models.deepseek_v3.weight_specs import (
    WeightSpec,
    WeightSpecs,
    embedding_weights,
    expert_weights,
    head_weights,
    layer_weights,
)
from stages.options import CacheOptions
from stages.plan import StageSpec
from stages.tensor_dtypes import TILE, WeightDtypes
from stages.wormhole import GALAXY_COLUMNS
from weights.model_config import ModelConfig


class ChipWeights:
    """The tensors of each part of a model on one chip of a stage of `rows` x `columns` chips."""

    def __init__(self, config: ModelConfig, dtypes: WeightDtypes, rows: int, columns: int = GALAXY_COLUMNS) -> None:
        self._config = config
        self._dtypes = dtypes
        self._rows = rows
        self._columns = columns

    def of_stage(self, spec: StageSpec) -> list[ChipTensor]:
        """All weights of a stage."""
        first = self.embedding() if spec.is_first else []
        last = self.head() if spec.is_last else []
        return [*first, *(tensor for layer in spec.layers for tensor in self.layer(layer)), *last]

    def embedding(self) -> list[ChipTensor]:
        """The table of hidden states."""
        return self._on_chip(embedding_weights(self._config, self._dtypes))

    def head(self) -> list[ChipTensor]:
        """The final norm, and the head."""
        return self._on_chip(head_weights(self._config, self._columns, self._dtypes))

    def layer(self, layer: int) -> list[ChipTensor]:
        """A decoder layer."""
        return self._on_chip(layer_weights(self._config, layer, self._dtypes))

    def experts(self) -> list[ChipTensor]:
        """The routed experts of a layer that lie on this chip."""
        return self._on_chip({"mlp": {"experts": expert_weights(self._config, self._dtypes)}})

    def selection(self) -> ChipTensor:
        """The state of a mixture: the columns of the identity that are this chip's experts."""
        experts = self._config.n_routed_experts
        local = experts // (self._rows * self._columns)
        return ChipTensor(name="select", shape=(1, 1, experts, local), dtype="bfloat16")

    def kv_cache(self, cache: CacheOptions) -> ChipTensor:
        """A layer's KV cache: the blocks of this chip's pool, and one of scratch."""
        shape = (cache.blocks + 1, 1, cache.block_size, self._config.kv_dim)
        return ChipTensor(name="kv_cache", shape=shape, dtype=self._dtypes.kv_cache)

    def rope_tables(self, cache: CacheOptions) -> list[ChipTensor]:
        """Cosines and sines of all positions of a request, once a stage, and the matrix that swaps pairs."""
        shape = (cache.blocks_per_slot * cache.block_size, self._config.qk_rope_head_dim)
        tables = [ChipTensor(name=name, shape=shape, dtype="bfloat16", layout="row_major") for name in ("cos", "sin")]
        return [*tables, ChipTensor(name="transformation", shape=(1, 1, TILE, TILE), dtype="bfloat16")]

    def _on_chip(self, specs: WeightSpecs) -> list[ChipTensor]:
        return list(self._each(specs, directory=""))

    def _each(self, specs: WeightSpecs, directory: str) -> Iterator[ChipTensor]:
        for key, spec in specs.items():
            if isinstance(spec, WeightSpec):
                # Several operands of one operation stand under its name, each by its own.
                path = directory.removesuffix("/") if key == spec.operand else directory + key
                yield ChipTensor(
                    name=f"{path}.{spec.operand}",
                    shape=spec.on_chip(self._rows, self._columns),
                    dtype=spec.dtype,
                    layout="tile" if spec.is_tiled else "row_major",
                )
            else:
                yield from self._each(spec, f"{directory}{key}/")
