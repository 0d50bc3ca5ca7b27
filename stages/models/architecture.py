"""What generic code needs of a family of models. Nothing here imports torch: plans are made without it."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from stages.options import CacheOptions
from stages.tensor_dtypes import TensorDtype, WeightDtypes
from weights.model_config import ModelConfig

if TYPE_CHECKING:
    from stages.models.module import Modules

LETTERS: dict[TensorDtype, str] = {"float32": "f", "bfloat16": "h", "bfloat8_b": "8", "bfloat4_b": "4"}
"""The letter of each dtype in `dtype_letters`."""


class WeightSpec(NamedTuple):
    """One operand of an op: the dimension that each mesh axis splits, None where it replicates.

    Where `all_chips` is a dimension, that one is split over all chips, row-major, instead; behind its part each chip
    has its column's part of `beside` more, which `shape` leaves out, as every row has them. `is_tiled` is the layout.
    """

    operand: str
    shape: tuple[int, ...]
    dtype: TensorDtype
    dims: tuple[int | None, int | None] = (None, None)
    all_chips: int | None = None
    is_tiled: bool = True
    beside: int = 0

    def on_mesh(self, rows: int) -> tuple[int, ...]:
        """The shape of what all chips of a mesh of so many rows hold together."""
        if self.all_chips is None:
            return self.shape
        shape = list(self.shape)
        shape[self.all_chips] += rows * self.beside
        return tuple(shape)

    def on_chip(self, rows: int, columns: int) -> tuple[int, ...]:
        """The shape on each chip of a mesh that can share it."""
        shape = list(self.shape)
        by_row, by_column = self.dims
        for dim, parts in ((by_row, rows), (by_column, columns), (self.all_chips, rows * columns)):
            if dim is not None:
                shape[dim] //= parts
        if self.all_chips is not None:
            shape[self.all_chips] += self.beside // columns
        return tuple(shape)


WeightSpecs: TypeAlias = "Mapping[str, WeightSpec | WeightSpecs]"
"""Operation name -> its weight, or weights by operand; a submodule's name -> its own WeightSpecs."""


def each_weight(specs: WeightSpecs) -> Iterator[WeightSpec]:
    """Yields all weights of a module and its submodules, in a fixed order."""
    for value in specs.values():
        if isinstance(value, WeightSpec):
            yield value
        else:
            yield from each_weight(value)


def dtype_letters(specs: WeightSpecs) -> str:
    """Returns the dtypes of `each_weight`, a letter each: they change with any setting that the weights depend on."""
    return "".join(LETTERS[spec.dtype] for spec in each_weight(specs))


class Launches(NamedTuple):
    """Programs of a module's forward pass, each of which a chip's host launches."""

    decode: int
    prefill: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpCounts:
    """Programs of each part of a forward pass on chips, where an op of ttnn may be none or several.

    `enter` is the embedding and the positions' cosines and sines, `head` is without its norm. A pass of the
    multi-token-prediction layer is two norms, `draft`, a decoder layer, a norm and `head`; the embedding is in `draft`,
    and positions are looked up before. `residual` is both additions of a layer.

    Decode steps of at most `joined_tokens` on each row have norms that add the residual: `joined` is both norms of a
    layer and what is added behind them, and `spread` what hidden states take before the first layer and behind the
    last. `cut` is what attention takes more in other decode steps, and `rows` a mixture on several rows.
    """

    norm: Launches
    attention: Launches
    mlp: Launches
    mixture: Launches
    residual: Launches
    enter: Launches
    head: Launches
    draft: Launches
    joined_tokens: int
    joined: int
    spread: int
    cut: int
    rows: int

    def layer(self, *, is_moe: bool, rows: int, tokens: int, is_decode: bool) -> int:
        """The programs of a decoder layer in a step with so many tokens on each of `rows` rows."""
        mode = 0 if is_decode else 1
        count = self.attention[mode] + (self.mixture if is_moe else self.mlp)[mode]
        count += self.rows if is_moe and rows > 1 else 0
        if self.is_joined(tokens, is_decode=is_decode):
            return count + self.joined
        cut = self.cut if is_decode else 0
        return count + 2 * self.norm[mode] + self.residual[mode] + cut

    def entering(self, *, tokens: int, is_decode: bool) -> int:
        """The programs around the layers of a stage."""
        return self.enter[0 if is_decode else 1] + (self.spread if self.is_joined(tokens, is_decode=is_decode) else 0)

    def joining(self, *, tokens: int, is_decode: bool) -> int:
        """The programs of a pass of the multi-token-prediction layer around its decoder layer, without the head."""
        mode = 0 if is_decode else 1
        around = self.spread if self.is_joined(tokens, is_decode=is_decode) else 0
        return 2 * self.norm[mode] + self.draft[mode] + around

    def is_joined(self, tokens: int, *, is_decode: bool) -> bool:
        """Whether norms add the residual."""
        return is_decode and tokens <= self.joined_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """A family of models: its weights on chips, its state, its costs and its modules.

    `name` is that of the family in the `architectures` of a config.json. Specs of weights are functions of the config
    and the dtypes, those of a layer also of its index, those of the head also of the columns of the mesh. Those of the
    multi-token-prediction layer, `draft_weights`, are for models that have one.
    `kv_cache_shape` is that of a layer on each chip, its last dimension the values that are kept for a token.
    `selection` is what a mixture of experts keeps beside its weights. `layer_cost` is the number of weights of a layer
    that the decode of one token reads, `draft_cost` that of a pass of the multi-token-prediction layer with the head.
    `load_modules` imports what computes, and with it torch and the device.
    """

    name: str
    embedding_weights: Callable[[ModelConfig, WeightDtypes], WeightSpecs]
    layer_weights: Callable[[ModelConfig, int, WeightDtypes], WeightSpecs]
    routed_expert_weights: Callable[[ModelConfig, WeightDtypes], WeightSpecs]
    head_weights: Callable[[ModelConfig, int, WeightDtypes], WeightSpecs]
    draft_weights: Callable[[ModelConfig, WeightDtypes], WeightSpecs]
    selection: Callable[[ModelConfig], WeightSpec]
    kv_cache_shape: Callable[[ModelConfig, CacheOptions], tuple[int, ...]]
    rope_width: Callable[[ModelConfig], int]
    layer_cost: Callable[[ModelConfig, int], int]
    draft_cost: Callable[[ModelConfig], int]
    ops: OpCounts
    load_modules: "Callable[[], Modules]"
