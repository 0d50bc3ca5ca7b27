"""The shapes and dtypes of the weights and the state that one chip of a stage holds for each part of the model.

The weights are those of the model's `Architecture`, as a mesh of rows x columns chips shares them; they are named as
their files below a part's directory. The state is what `create_state` of the model's modules creates.
"""

import math
from collections.abc import Iterator
from typing import Literal

import msgspec

from stages.models.architecture import WeightSpec, WeightSpecs
from stages.models.registry import architecture_of
from stages.options import CacheOptions
from stages.plan import StageSpec
from stages.tensor_dtypes import TILE, TILE_BYTES, VALUE_BYTES, TensorDtype, WeightDtypes
from stages.wormhole import DRAM_ALIGNMENT, DRAM_BANKS, GALAXY_COLUMNS
from weights.model_config import ModelConfig
from weights.sizes import ceil_div, round_up

Layout = Literal["tile", "row_major"]


class ChipTensor(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor of `shape` on one chip, in memory that is interleaved over banks.

    Weights are named as their files below a part's directory. Row-major tensors have dtypes of whole bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: TensorDtype
    layout: Layout = "tile"

    @property
    def values(self) -> int:
        """The number of values, padding not counted."""
        return math.prod(self.shape)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, which is a tile or a row."""
        if self.layout == "tile":
            return TILE_BYTES[self.dtype]
        return round_up(self.shape[-1] * VALUE_BYTES[self.dtype], DRAM_ALIGNMENT)

    @property
    def pages(self) -> int:
        """The number of pages: tiles, with the last two dimensions padded to whole ones, or rows."""
        if self.layout == "row_major":
            return math.prod(self.shape[:-1])
        height, width = (ceil_div(size, TILE) for size in self.shape[-2:])
        return math.prod(self.shape[:-2]) * height * width

    @property
    def bytes(self) -> int:
        """Bytes of all pages."""
        return self.pages * self.page_bytes

    def allocated(self, banks: int = DRAM_BANKS) -> int:
        """Bytes that the allocator takes: as many pages in every bank as the fullest one gets."""
        return round_up(self.pages, banks) * self.page_bytes


class ChipWeights:
    """The tensors of each part of a model on one chip of a stage of `rows` x `columns` chips."""

    def __init__(self, config: ModelConfig, dtypes: WeightDtypes, rows: int, columns: int = GALAXY_COLUMNS) -> None:
        self._config = config
        self._architecture = architecture_of(config)
        self._dtypes = dtypes
        self._rows = rows
        self._columns = columns

    def of_stage(self, spec: StageSpec, *, drafts: bool = False) -> list[ChipTensor]:
        """All weights of a stage; with `drafts` the last one has what makes them."""
        first = self.embedding() if spec.is_first else []
        last = self.head() if spec.is_last else []
        drafting = self.drafting(is_first=spec.is_first) if drafts and spec.is_last else []
        return [*first, *(tensor for layer in spec.layers for tensor in self.layer(layer)), *last, *drafting]

    def drafting(self, *, is_first: bool) -> list[ChipTensor]:
        """What the last stage has to make drafts: their layer, and the embedding unless it is the first stage too."""
        return self.draft() if is_first else [*self.embedding(), *self.draft()]

    def embedding(self) -> list[ChipTensor]:
        """The embedding table."""
        return self._on_chip(self._architecture.embedding_weights(self._config, self._dtypes))

    def head(self) -> list[ChipTensor]:
        """The final norm and the output head."""
        return self._on_chip(self._architecture.head_weights(self._config, self._columns, self._dtypes))

    def layer(self, layer: int) -> list[ChipTensor]:
        """The weights of a decoder layer."""
        return self._on_chip(self._architecture.layer_weights(self._config, layer, self._dtypes))

    def draft(self) -> list[ChipTensor]:
        """The multi-token-prediction layer of a model that has one."""
        return self._on_chip(self._architecture.draft_weights(self._config, self._dtypes))

    def experts(self) -> list[ChipTensor]:
        """The weights of a layer's routed experts that are on this chip."""
        return self._on_chip(self._architecture.routed_expert_weights(self._config, self._dtypes))

    @property
    def stacks_experts(self) -> bool:
        """Whether a chip runs its experts as one network, the shared ones among them."""
        return any(tensor.name.endswith(".w13") for tensor in self.experts())

    def selection(self) -> ChipTensor:
        """The state of a mixture of experts: the columns of the identity matrix that select this chip's experts."""
        spec = self._architecture.selection(self._config)
        return ChipTensor(name=spec.operand, shape=spec.on_chip(self._rows, self._columns), dtype=spec.dtype)

    def kv_cache(self, cache: CacheOptions) -> ChipTensor:
        """A layer's KV cache: the blocks of this chip's pool, and one scratch block."""
        shape = self._architecture.kv_cache_shape(self._config, cache)
        return ChipTensor(name="kv_cache", shape=shape, dtype=self._dtypes.kv_cache)

    def rope_tables(self, cache: CacheOptions) -> list[ChipTensor]:
        """The cosines and sines of all positions of a request, once a stage, and the matrix that swaps pairs."""
        shape = (cache.blocks_per_slot * cache.block_size, self._architecture.rope_width(self._config))
        tables = [ChipTensor(name=name, shape=shape, dtype="bfloat16", layout="row_major") for name in ("cos", "sin")]
        return [*tables, ChipTensor(name="transformation", shape=(1, 1, TILE, TILE), dtype="bfloat16")]

    def _on_chip(self, specs: WeightSpecs) -> list[ChipTensor]:
        return list(self._each(specs, directory=""))

    def _each(self, specs: WeightSpecs, directory: str) -> Iterator[ChipTensor]:
        for key, spec in specs.items():
            if isinstance(spec, WeightSpec):
                # Several operands of one operation are grouped under its name, each under its own.
                path = directory.removesuffix("/") if key == spec.operand else directory + key
                yield ChipTensor(
                    name=f"{path}.{spec.operand}",
                    shape=spec.on_chip(self._rows, self._columns),
                    dtype=spec.dtype,
                    layout="tile" if spec.is_tiled else "row_major",
                )
            else:
                yield from self._each(spec, f"{directory}{key}/")
