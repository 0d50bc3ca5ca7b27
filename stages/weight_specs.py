"""Weights as chips hold them: the shape, dtype and sharding of an operand, whatever the model."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeAlias

from stages.tensor_dtypes import TensorDtype

LETTERS: dict[TensorDtype, str] = {"float32": "f", "bfloat16": "h", "bfloat8_b": "8", "bfloat4_b": "4"}
"""The letter of each dtype in `dtype_letters`."""


class WeightSpec(NamedTuple):
    """One operand of an op: the dimension that each mesh axis splits, None where it replicates.

    Where `all_chips` is a dimension, that one is split over all chips, row-major, instead. `is_tiled` is the layout.
    """

    operand: str
    shape: tuple[int, ...]
    dtype: TensorDtype
    dims: tuple[int | None, int | None] = (None, None)
    all_chips: int | None = None
    is_tiled: bool = True

    def on_chip(self, rows: int, columns: int) -> tuple[int, ...]:
        """The shape on each chip of a mesh that can share it."""
        shape = list(self.shape)
        by_row, by_column = self.dims
        for dim, parts in ((by_row, rows), (by_column, columns), (self.all_chips, rows * columns)):
            if dim is not None:
                shape[dim] //= parts
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
