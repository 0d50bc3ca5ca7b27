"""Paged caches: [blocks, 1, block_size, width] a chip, addressed through page tables."""

import dataclasses
from collections.abc import Callable

import torch

from stages.backend.embedded.chips import on_chips, refuse, refuse_because
from stages.backend.embedded.dtype import int32
from stages.backend.embedded.tensor import Tensor
from stages.errors import DeviceError


@dataclasses.dataclass(frozen=True)
class DecodePages:
    """Where the users of one chip write and read in a decode step.

    `active` lists the users whose position is not -1 (None if all are) and `rows` the row of the flattened cache that
    each of them writes. `blocks` are the blocks to read, as many for each user as the longest needs; `hidden` marks,
    [users, 1, longest], what lies behind a user's own position (None if all are equally long); `idle` lists the other
    users (None if there are none).
    """

    active: torch.Tensor | None
    idle: torch.Tensor | None
    rows: torch.Tensor
    blocks: torch.Tensor
    longest: int
    hidden: torch.Tensor | None


def decode_pages(op: str, positions: Tensor, page_table: Tensor, block_size: int) -> list[DecodePages]:
    """The pages of each chip, kept with `positions`, as every layer of a step asks for the same ones.

    `positions` [users] and `page_table` [users, pages] are int32; position -1 skips a user. Raises DeviceError where
    the two disagree or a page table does not reach a position.
    """

    def find() -> list[DecodePages]:
        _refuse_other_tables(op, positions, page_table)
        return on_chips(op, lambda at, table: _pages_of(op, at, table, block_size), positions, page_table)

    return positions.remember((page_table, block_size), find)


def _refuse_other_tables(op: str, positions: Tensor, page_table: Tensor) -> None:
    if positions.dtype is not int32 or page_table.dtype is not int32:
        refuse(op, "positions and page table must be int32", positions, page_table)
    if len(positions.shape) != 1 or len(page_table.shape) != 2 or positions.shape[0] != page_table.shape[0]:
        refuse(op, "it takes positions [users] and a page table [users, pages]", positions, page_table)


def _pages_of(op: str, positions: torch.Tensor, table: torch.Tensor, block_size: int) -> DecodePages:
    longest = int(positions.max()) + 1
    if longest > table.shape[1] * block_size:
        raise DeviceError(
            f"{op}: a page table of {table.shape[1]} blocks of {block_size} does not reach position {longest - 1}."
        )
    skipped = positions < 0
    some_skipped = bool(skipped.any())
    active = (~skipped).nonzero().flatten() if some_skipped else None
    at, own = (positions, table) if active is None else (positions[active], table[active])
    rows = own.gather(1, (at // block_size)[:, None]).flatten() * block_size + at % block_size
    reached = torch.arange(-(-longest // block_size)) * block_size <= positions[:, None]
    blocks = table[:, : reached.shape[1]].where(reached, torch.zeros_like(positions)[:, None]).flatten()
    hidden = torch.arange(longest) > positions[:, None]
    return DecodePages(
        active=active,
        idle=skipped.nonzero().flatten() if some_skipped else None,
        rows=rows,
        blocks=blocks,
        longest=longest,
        hidden=hidden[:, None] if bool(hidden.any()) else None,
    )


def table_row(op: str, page_table: torch.Tensor, user: int, tokens: int, block_size: int) -> torch.Tensor:
    """The blocks of a user's first `tokens` tokens. Raises DeviceError where the page table does not reach."""
    needed = -(-tokens // block_size)
    if user >= page_table.shape[0] or needed > page_table.shape[1]:
        raise DeviceError(
            f"{op}: a page table of {list(page_table.shape)} blocks of {block_size} does not hold {tokens} tokens "
            f"of user {user}."
        )
    return page_table[user, :needed]


def write_in_place(op: str, write: Callable[..., None], cache: Tensor, *operands: Tensor) -> None:
    """Lets `write(chip, cache shard, operand shards...)` change each chip's cache.

    Chips that share a cache shard and all operands write once; a shared cache shard into which different values go is
    parted first, as each chip has a memory of its own.
    """
    if any(operand.mesh is not cache.mesh for operand in operands):
        refuse(op, "its operands are on different meshes, or one is on the host", cache, *operands)
    writers: dict[int, tuple[int, ...]] = {}
    parted: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}
    shards = list(cache.shards)
    for chip, shard in enumerate(shards):
        source = tuple(id(operand.shards[chip]) for operand in operands)
        if writers.setdefault(id(shard), source) != source:
            key = (id(shard), source)
            if key not in parted:
                parted[key] = shard.clone()
            cache.shards[chip] = parted[key]
    written: set[int] = set()
    for chip, shard in enumerate(cache.shards):
        if id(shard) not in written:
            written.add(id(shard))
            try:
                write(chip, shard, *[operand.shards[chip] for operand in operands])
            except (RuntimeError, IndexError) as error:
                refuse_because(op, error, cache, *operands)
