"""The device's inputs of a step: where its tokens lie on the mesh, their positions and their page tables.

Axis 0 of the mesh shares out the batch: a row has the tokens of its own slots, and each of its columns keeps the cache
of its own pool. The tokens of a pool form one lane of its row. All lanes are equally long, so that attention can
exchange heads for lanes. Lanes are padded where shapes must be few; one embedded chip takes a step as it is.
"""

import dataclasses
from typing import NamedTuple

import torch

from stages.backend import ttnn
from stages.backend.fused import NormBuffers
from stages.models.rope import Rope

HIDDEN_DTYPE = "bfloat16"
"""ttnn's name of the dtype of hidden states between layers and stages."""

PADDING = -1
"""The index in a layout, and the slot, of a token that only fills a lane."""


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """The places of a step's tokens on the mesh: `width` on each of its rows.

    `tokens` [rows * width] has, row by row, the index of the token at each place, or PADDING. It is None where every
    token lies at its own index, on one chip.
    """

    rows: int
    width: int
    tokens: torch.Tensor | None

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """[tokens, ...] -> [rows * width, ...], zero where there is padding."""
        if self.tokens is None:
            return values
        placed = values[self.tokens.clamp(min=0)]
        placed[self.tokens == PADDING] = 0
        return placed

    def collect(self, values: torch.Tensor) -> torch.Tensor:
        """[rows * width, ...] -> [tokens, ...]: the inverse of `spread`."""
        return values if self.tokens is None else values[self.places()]

    def places(self) -> torch.Tensor:
        """The place of each of the step's tokens, int64 [tokens]."""
        if self.tokens is None:
            return torch.arange(self.width)
        taken = (self.tokens != PADDING).nonzero()[:, 0]
        return taken[self.tokens[taken].argsort()]


@dataclasses.dataclass(frozen=True)
class PrefillGroup:
    """Segments that attend together: at most one of every pool, all from the same position `start`.

    Each fills a lane of `length` tokens, and `lanes` has the index on a row at which each column's lane begins. A
    column that is not one of `columns` has no segment: it borrows another's lane and writes its results to scratch
    blocks. `chunk_pages` [1, blocks] are the blocks of these tokens on each
    chip, `pages` [1, blocks] those from the sequence's first token on; both int32.
    """

    start: int
    length: int
    lanes: list[int]
    columns: list[int]
    chunk_pages: ttnn.Tensor
    pages: ttnn.Tensor


@dataclasses.dataclass(frozen=True)
class PrefillBatch:
    """Segments of many tokens: `rope` for all tokens of a row, and the groups in which they attend."""

    layout: TokenLayout
    rope: Rope
    groups: list[PrefillGroup]


class Place(NamedTuple):
    """A token of a decode step: its slot and its position there."""

    slot: int
    position: int


class CacheWrites(NamedTuple):
    """How every chip of a row adds the tokens of all users of the row to its cache, and skips those of others.

    `positions` [users of the row], int32, are -1 for users of other chips; `pages` [users of the row, blocks], int32,
    are the same on all chips of a row. `memory_config` is the layout of what is added, a core for each user.
    """

    positions: ttnn.Tensor
    pages: ttnn.Tensor
    memory_config: ttnn.MemoryConfig


@dataclasses.dataclass(frozen=True)
class DecodeBatch:
    """Single tokens: `users` of every pool, of as many requests, or of fewer with drafts behind their tokens.

    `rope` is for all tokens of a row; `positions` [users] and `pages` [users, blocks], int32, are each chip's own.
    `kv_memory_config` is the layout of what they add to the cache, a core for each user, and `q_memory_config` that of
    their queries. All are added before any attends, so a draft finds the tokens before it.

    `writes` and `norms`, those of a layer's first and second norm, are for rows of several chips that have at most a
    tile of users.
    """

    layout: TokenLayout
    rope: Rope
    users: int
    positions: ttnn.Tensor
    pages: ttnn.Tensor
    kv_memory_config: ttnn.MemoryConfig
    q_memory_config: ttnn.MemoryConfig
    writes: CacheWrites | None = None
    norms: tuple[NormBuffers, NormBuffers] | None = None

    def interleaved(self, x: ttnn.Tensor) -> ttnn.Tensor:
        """Returns hidden states as others than decoder layers take them: not spread over cores by columns."""
        return x if self.norms is None else ttnn.to_memory_config(x, ttnn.L1_MEMORY_CONFIG)
