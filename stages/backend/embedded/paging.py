"""Paged caches, [blocks, 1, block_size, width] on each chip, addressed through page tables."""

import dataclasses
import itertools
from collections.abc import Callable

import torch

from stages.backend.embedded.chips import on_chips, refuse, refuse_because
from stages.backend.embedded.dtype import ROW_MAJOR_LAYOUT, int32
from stages.backend.embedded.tensor import Tensor
from stages.backend.embedded.trace import atomic
from stages.errors import DeviceError
from weights.sizes import ceil_div

LATENTS_AT_ONCE = 1 << 20
"""The most cache values that attention gathers at once, so that they stay in a core's cache between two products."""


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Users of similar lengths, whose attention is computed together.

    `users` are their indices, None for all of the chip's users in order. Each `lanes` of them have the same blocks, as
    a token and its drafts do, and read them together: `blocks` has as many for each such as the longest needs. `hidden`
    [users, 1, longest] masks what is after a user's own position (None if all are equally long).
    """

    users: torch.Tensor | None
    lanes: int
    blocks: torch.Tensor
    longest: int
    hidden: torch.Tensor | None


@dataclasses.dataclass(frozen=True)
class DecodePages:
    """Where the users of one chip write and read in a decode step.

    `active` are the users whose position is not -1 (None if all are active), and `rows` the row of the flattened cache
    that each of them writes. They read in `buckets`.
    """

    active: torch.Tensor | None
    rows: torch.Tensor
    buckets: list[Bucket]


def decode_pages(op: str, positions: Tensor, page_table: Tensor, cache: Tensor) -> list[DecodePages]:
    """The pages of each chip, kept with `positions`, as all layers of a step use the same ones.

    `positions` [users] and `page_table` [users, pages] are int32; position -1 skips a user. Raises DeviceError if the
    two disagree or a page table does not reach a position.
    """
    block_size, width = cache.shape[2:]

    def find() -> list[DecodePages]:
        _refuse_other_tables(op, positions, page_table)
        return on_chips(op, lambda at, table: _pages_of(op, at, table, block_size, width), positions, page_table)

    return positions.remember((page_table, block_size, width), find)


def _refuse_other_tables(op: str, positions: Tensor, page_table: Tensor) -> None:
    if positions.dtype is not int32 or page_table.dtype is not int32:
        refuse(op, "positions and page table must be int32", positions, page_table)
    if positions.layout is not ROW_MAJOR_LAYOUT or page_table.layout is not ROW_MAJOR_LAYOUT:
        refuse(op, "positions and page table must be in ROW_MAJOR layout", positions, page_table)
    if len(positions.shape) != 1 or len(page_table.shape) != 2 or positions.shape[0] != page_table.shape[0]:
        refuse(op, "it takes positions [users] and a page table [users, pages]", positions, page_table)


@atomic
def _pages_of(op: str, positions: torch.Tensor, table: torch.Tensor, block_size: int, width: int) -> DecodePages:
    lengths = [position + 1 for position in positions.tolist()]
    needed = ceil_div(max(lengths), block_size)
    if needed > table.shape[1]:
        raise DeviceError(
            f"{op}: a page table of {table.shape[1]} blocks of {block_size} does not reach position {max(lengths) - 1}."
        )
    users = [user for user, length in enumerate(lengths) if length > 0]
    active = None if len(users) == len(lengths) else torch.tensor(users, dtype=torch.int64)
    # Lists of Python, as the many small operators that would find these indices take longer than a layer's attention.
    blocks = table[:, :needed].tolist()
    ends = [(blocks[user], lengths[user] - 1) for user in users]
    rows = [own[end // block_size] * block_size + end % block_size for own, end in ends]
    buckets = [_bucket(group, lengths, blocks, block_size) for group in _grouped(users, lengths, width)]
    return DecodePages(active, torch.tensor(rows, dtype=torch.int64), buckets)


def _grouped(users: list[int], lengths: list[int], width: int) -> list[list[int]]:
    """Groups users by falling length; a group ends before padding exceeds a quarter, or the latents their bound."""
    groups: list[list[int]] = []
    for user in sorted(users, key=lambda user: -lengths[user]):
        if groups:
            group = groups[-1]
            longest = lengths[group[0]]
            if lengths[user] * 4 >= longest * 3 and (len(group) + 1) * longest * width <= LATENTS_AT_ONCE:
                group.append(user)
                continue
        groups.append([user])
    return [sorted(group) for group in groups]


def _bucket(group: list[int], lengths: list[int], blocks: list[list[int]], block_size: int) -> Bucket:
    own = [lengths[user] for user in group]
    longest = max(own)
    needed = ceil_div(longest, block_size)
    lanes = _lanes([blocks[user] for user in group])
    read: list[int] = []
    for begin in range(0, len(group), lanes):
        # A page table has no meaning beyond its user's length: block 0 is read there, and masked.
        reached = ceil_div(max(own[begin : begin + lanes]), block_size)
        read += blocks[group[begin]][:reached] + [0] * (needed - reached)
    hidden = None
    if min(own) < longest:
        hidden = torch.arange(longest) >= torch.tensor(own)[:, None, None]
    users = None if group == list(range(len(blocks))) else torch.tensor(group)
    return Bucket(users, lanes, torch.tensor(read), longest, hidden)


def _lanes(blocks: list[list[int]]) -> int:
    """The number of successive users with the same blocks, if it is the same all along, else 1."""
    runs = [len(list(run)) for _, run in itertools.groupby(blocks)]
    return runs[0] if min(runs) == max(runs) else 1


def table_row(op: str, page_table: torch.Tensor, user: int, tokens: int, block_size: int) -> torch.Tensor:
    """The blocks of a user's first `tokens` tokens. Raises DeviceError if the page table does not reach that far."""
    needed = ceil_div(tokens, block_size)
    if user >= page_table.shape[0] or needed > page_table.shape[1]:
        raise DeviceError(
            f"{op}: a page table of {list(page_table.shape)} blocks of {block_size} does not hold {tokens} tokens "
            f"of user {user}."
        )
    return page_table[user, :needed]


def write_in_place(op: str, write: Callable[..., None], cache: Tensor, *operands: Tensor) -> None:
    """Calls `write(chip, cache shard, operand shards...)` to change each chip's cache.

    It is called once for chips that share a cache shard and all operands. A shared cache shard that would get different
    values is copied first, as each chip has its own memory.
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
