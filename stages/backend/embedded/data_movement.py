"""Ops that move values without computing; most results are views of the same memory."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual name

from stages.backend.embedded.chips import on_chips, refuse, unary
from stages.backend.embedded.dtype import (
    BLOCK_FLOATS,
    ROW_MAJOR_LAYOUT,
    TILE_LAYOUT,
    TILE_SIZE,
    DataType,
    Layout,
    bfloat16,
    float32,
    uint16,
    uint32,
)
from stages.backend.embedded.eltwise import typecast
from stages.backend.embedded.memory import MemoryConfig, ShardSpec, TensorMemoryLayout
from stages.backend.embedded.tensor import Tensor
from stages.errors import DeviceError
from weights.sizes import ceil_div, round_up


def reshape(input_tensor: Tensor, shape: Sequence[int], *, memory_config: MemoryConfig | None = None) -> Tensor:
    """Gives the same values, in row-major order, another shape; one dimension may be -1."""
    return unary("reshape", lambda a: a.reshape(shape), input_tensor)


def permute(input_tensor: Tensor, dims: Sequence[int], *, memory_config: MemoryConfig | None = None) -> Tensor:
    """Reorders dimensions: dimension i of the output is dimension `dims[i]` of the input.

    Raises DeviceError as `to_memory_config` does where `memory_config` is sharded.
    """
    order = tuple(dims)
    permuted = unary("permute", lambda a: a.permute(order), input_tensor)
    return permuted if memory_config is None else to_memory_config(permuted, memory_config)


def transpose(input_tensor: Tensor, dim1: int, dim2: int, *, memory_config: MemoryConfig | None = None) -> Tensor:
    """Swaps two dimensions."""
    return unary("transpose", lambda a: a.transpose(dim1, dim2), input_tensor)


def slice(
    input_tensor: Tensor, starts: Sequence[int], ends: Sequence[int], *, memory_config: MemoryConfig | None = None
) -> Tensor:
    """Cuts out `starts[i]` up to `ends[i]` of every dimension i. Raises DeviceError if that is out of range."""
    shape = input_tensor.shape
    if not len(starts) == len(ends) == len(shape):
        refuse("slice", f"{list(starts)} to {list(ends)} does not name each dimension once", input_tensor)

    def cut(a: torch.Tensor) -> torch.Tensor:
        for dim, size in enumerate(shape):
            start, end = starts[dim], ends[dim]
            if start or end != size:
                # torch refuses what is out of range, except a negative start, which it counts from the end.
                if not 0 <= start < end:
                    refuse("slice", f"{list(starts)} to {list(ends)} is out of range", input_tensor)
                a = a.narrow(dim, start, end - start)
        return a

    return unary("slice", cut, input_tensor)


def concat(tensors: Sequence[Tensor], dim: int = 0, *, memory_config: MemoryConfig | None = None) -> Tensor:
    """Concatenates tensors of one dtype along `dim`."""
    if not tensors:
        raise DeviceError("concat needs at least one tensor.")
    first = tensors[0]
    if any(tensor.dtype is not first.dtype for tensor in tensors):
        refuse("concat", "the tensors have different dtypes", *tensors)
    shards = on_chips("concat", lambda *parts: torch.cat(parts, dim), *tensors)
    return Tensor(shards, first.dtype, first.layout, first.mesh)


def split(
    input_tensor: Tensor, split_size: int | Sequence[int], dim: int = 0, *, memory_config: MemoryConfig | None = None
) -> list[Tensor]:
    """Cuts `dim` into parts of `split_size`, or of the sizes in it."""
    x = input_tensor
    parts = on_chips("split", lambda a: a.split(split_size, dim), x)
    return [Tensor(list(shards), x.dtype, x.layout, x.mesh) for shards in zip(*parts, strict=True)]


def repeat(input_tensor: Tensor, repeat_dims: Sequence[int], *, memory_config: MemoryConfig | None = None) -> Tensor:
    """Repeats each dimension i `repeat_dims[i]` times."""
    return unary("repeat", lambda a: a.repeat(*repeat_dims), input_tensor)


def pad(
    input_tensor: Tensor,
    padding: Sequence[tuple[int, int]],
    value: float,
    *,
    memory_config: MemoryConfig | None = None,
) -> Tensor:
    """Pads each dimension with `value`; `padding` has the numbers before and after each."""
    if len(padding) != len(input_tensor.shape):
        refuse("pad", f"{list(padding)} does not name each dimension once", input_tensor)
    if any(amount < 0 for before_after in padding for amount in before_after):
        refuse("pad", f"{list(padding)} takes values away", input_tensor)
    flat = [amount for before_after in reversed(padding) for amount in before_after]
    return unary("pad", lambda a: F.pad(a, flat, value=value), input_tensor)


def to_layout(
    tensor: Tensor, layout: Layout, dtype: DataType | None = None, *, memory_config: MemoryConfig | None = None
) -> Tensor:
    """Changes the layout, which does not affect how shards are stored. Block floats become bfloat16 outside TILE."""
    if layout is ROW_MAJOR_LAYOUT and dtype is None and tensor.dtype in BLOCK_FLOATS:
        dtype = bfloat16
    if tensor.layout is not layout:
        tensor = Tensor(tensor.shards, tensor.dtype, layout, tensor.mesh)
    return tensor if dtype is None else typecast(tensor, dtype)


def to_memory_config(tensor: Tensor, memory_config: MemoryConfig, dtype: DataType | None = None) -> Tensor:
    """Keeps the shards, as a host has one kind of memory, and records the `shard_spec`, which some ops require.

    Raises DeviceError if a height-sharded config has another width than the tensor, or too few cores.
    """
    spec = memory_config.shard_spec
    if spec is not None and memory_config.memory_layout is TensorMemoryLayout.HEIGHT_SHARDED:
        _refuse_other_cores(tensor, spec)
    if dtype is not None:
        tensor = typecast(tensor, dtype)
    if spec is tensor.shard_spec:
        return tensor
    return Tensor(tensor.shards, tensor.dtype, tensor.layout, tensor.mesh, spec)


def _refuse_other_cores(x: Tensor, spec: ShardSpec) -> None:
    *others, height, width = x.shape
    if x.layout is TILE_LAYOUT:
        height, width = (round_up(size, TILE_SIZE) for size in (height, width))
    cores = ceil_div(math.prod(others) * height, spec.shape[0])
    if spec.shape[1] != width or cores > spec.cores:
        reason = f"it cannot be laid out as {list(spec.shape)} on each of {spec.cores} cores"
        refuse("to_memory_config", reason, x)


def gather(input: Tensor, dim: int, index: Tensor, *, memory_config: MemoryConfig | None = None) -> Tensor:
    """Gathers the values at `index` (uint16 or uint32) along `dim`. Raises DeviceError if the layouts differ."""
    _refuse_other_indices("gather", input, index)
    if input.layout is not index.layout:
        refuse("gather", "input and indices must be in one layout", input, index)
    shards = on_chips("gather", lambda a, i: a.gather(dim, i), input, index)
    return Tensor(shards, input.dtype, input.layout, input.mesh)


def scatter(
    input: Tensor, dim: int, index: Tensor, src: Tensor, *, memory_config: MemoryConfig | None = None
) -> Tensor:
    """Returns a copy of `input` with `src` written at `index` (uint16 or uint32) along `dim`.

    Raises DeviceError for float32 in TILE layout, and if `src` has another dtype.
    """
    _refuse_other_indices("scatter", input, index)
    if input.dtype is not src.dtype:
        refuse("scatter", f"it cannot write {src.dtype.name} into {input.dtype.name}", input, src)
    if input.dtype is float32 and input.layout is TILE_LAYOUT:
        refuse("scatter", "it takes no FLOAT32 in TILE layout", input, src)
    shards = on_chips("scatter", lambda a, i, s: a.scatter(dim, i, s), input, index, src)
    return Tensor(shards, input.dtype, input.layout, input.mesh)


def _refuse_other_indices(op: str, x: Tensor, index: Tensor) -> None:
    if index.dtype is not uint16 and index.dtype is not uint32:
        refuse(op, f"indices must be uint16 or uint32, not {index.dtype.name}", x, index)


def embedding(
    input_tensor: Tensor,
    weight: Tensor,
    *,
    layout: Layout | None = None,
    dtype: DataType | None = None,
    memory_config: MemoryConfig | None = None,
) -> Tensor:
    """Looks up rows of a bfloat16 `weight` [V, D] or [1, 1, V, D] for uint32 ids [B, T] or [B, 1, 1, T]: [B, T, D].

    The layout is the table's unless `layout` is given; rows of a table in block floats are bfloat16. Raises DeviceError
    for ids of another dtype or outside the table: a chip accepts bfloat16 ids and rounds them.
    """
    ids = input_tensor
    if ids.dtype is not uint32:
        refuse("embedding", f"ids must be uint32, not {ids.dtype.name}", ids, weight)
    shape = ids.shape
    if len(shape) < 2 or any(size != 1 for size in shape[1:-1]):
        refuse("embedding", "ids must be [B, T] or [B, 1, 1, T]", ids, weight)
    table_shape = weight.shape
    if (weight.dtype is not bfloat16 and weight.dtype not in BLOCK_FLOATS) or table_shape[:-2].numel() != 1:
        refuse("embedding", f"the table must be one of bfloat16, not {weight.dtype.name}", ids, weight)

    def look_up(chosen: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return F.embedding(chosen.view(shape[0], shape[-1]), table.view(-1, table.shape[-1]))

    output = Tensor(on_chips("embedding", look_up, ids, weight), bfloat16, layout or weight.layout, weight.mesh)
    return output if dtype is None else typecast(output, dtype)
