"""Torch functions applied on every chip of a mesh, once for chips that share their operands, and refusals of ops."""

from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch

from stages.backend.embedded.dtype import INTEGERS, TILE_LAYOUT
from stages.backend.embedded.tensor import Tensor
from stages.errors import DeviceError

Result = TypeVar("Result")


def unary(op: str, function: Callable[[torch.Tensor], torch.Tensor], x: Tensor) -> Tensor:
    """Applies `function` to each shard; the result has x's dtype and layout. Raises DeviceError if torch refuses."""
    shards = x.shards
    if len(shards) == 1:
        try:
            return Tensor([function(shards[0])], x.dtype, x.layout, x.mesh)
        except (RuntimeError, IndexError) as error:
            refuse_because(op, error, x)
    return Tensor(on_chips(op, function, x), x.dtype, x.layout, x.mesh)


def binary(op: str, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Applies `function` to each chip's two shards; the result has the dtype and layout of `x`.

    Raises DeviceError as `on_chips` does.
    """
    shards = x.shards
    if len(shards) == 1 and x.mesh is y.mesh and y.shards:
        try:
            return Tensor([function(shards[0], y.shards[0])], x.dtype, x.layout, x.mesh)
        except (RuntimeError, IndexError) as error:
            refuse_because(op, error, x, y)
    return Tensor(on_chips(op, function, x, y), x.dtype, x.layout, x.mesh)


def on_chips(op: str, function: Callable[..., Result], *operands: Tensor) -> list[Result]:
    """Applies `function` to each chip's shards of `operands`; returns one result for each chip.

    Chips whose shards are the same objects share one call and its result. Raises DeviceError if the operands are on
    different meshes or deallocated, or if torch refuses.
    """
    mesh = operands[0].mesh
    for operand in operands:
        if operand.mesh is not mesh or not operand.shards:
            _refuse_misplaced(op, *operands)
    try:
        if mesh.size == 1:
            return [function(*[operand.shards[0] for operand in operands])]
        results: dict[tuple[int, ...], Result] = {}
        output = []
        for shards in zip(*[operand.shards for operand in operands], strict=True):
            key = tuple(map(id, shards))
            if key not in results:
                results[key] = function(*shards)
            output.append(results[key])
    except (RuntimeError, IndexError) as error:
        refuse_because(op, error, *operands)
    return output


def _refuse_misplaced(op: str, *operands: Tensor) -> NoReturn:
    # The shape of a deallocated operand raises an error of its own.
    refuse(op, "its operands are on different meshes, or one is on the host", *operands)


def refuse_all_but_tiles(op: str, *operands: Tensor) -> None:
    """Raises DeviceError if an operand is not in TILE layout."""
    for operand in operands:
        if operand.layout is not TILE_LAYOUT:
            refuse(op, "its operands must be in TILE layout", *operands)


def refuse_all_but_float_tiles(op: str, *operands: Tensor) -> None:
    """Raises DeviceError if an operand is not in TILE layout, or holds integers."""
    for operand in operands:
        if operand.layout is not TILE_LAYOUT:
            refuse(op, "its operands must be in TILE layout", *operands)
        if operand.dtype in INTEGERS:
            refuse(op, f"its operands must be floats, not {operand.dtype.name}", *operands)


def refuse(op: str, reason: str, *operands: Tensor) -> NoReturn:
    """Raises DeviceError with the op, the reason and the operands' shapes in its message."""
    shapes = " and ".join(str(list(operand.shape)) for operand in operands)
    raise DeviceError(f"{op} refuses {shapes}: {reason}.")


def refuse_because(op: str, error: Exception, *operands: Tensor) -> NoReturn:
    """Raises DeviceError from an error of torch."""
    shapes = " and ".join(str(list(operand.shape)) for operand in operands)
    raise DeviceError(f"{op} refuses {shapes}: {str(error).splitlines()[0].rstrip('.')}.") from error
