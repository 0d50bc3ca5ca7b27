"""The device's inputs of a step: where its tokens lie on the mesh, their positions and their page tables.

Axis 0 of the mesh shares out the batch: a row has the tokens of its own slots, and on it a column keeps the cache of
its own pool. Each pool of a row has one lane of tokens, as long as every other lane, so that attention can swap heads
for lanes. Lanes are padded where shapes must be few; one embedded chip takes a step as it is.
"""

import dataclasses

import torch

from stages.backend import ttnn
from stages.models.deepseek_v3.rope import Rope

HIDDEN_DTYPE = "bfloat16"
"""ttnn's name of the dtype of hidden states between layers and stages."""

PADDING = -1
"""In the places of tokens: one that only fills a lane."""


@dataclasses.dataclass(frozen=True)
class Places:
    """Which of a step's tokens lies where: `tokens` [rows * width], row by row, each a token's index or PADDING.

    `tokens` is None where every token lies at its own index, on one chip.
    """

    rows: int
    width: int
    tokens: torch.Tensor | None

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """[tokens, ...] -> [rows * width, ...], zero where a place is padding."""
        if self.tokens is None:
            return values
        placed = values[self.tokens.clamp(min=0)]
        placed[self.tokens == PADDING] = 0
        return placed

    def collect(self, values: torch.Tensor) -> torch.Tensor:
        """[rows * width, ...] -> [tokens, ...]: the inverse of `spread`."""
        return values if self.tokens is None else values[self.of_tokens()]

    def of_tokens(self) -> torch.Tensor:
        """The place of each of the step's tokens."""
        if self.tokens is None:
            return torch.arange(self.width)
        taken = (self.tokens != PADDING).nonzero()[:, 0]
        return taken[self.tokens[taken].argsort()]


@dataclasses.dataclass(frozen=True)
class PrefillRound:
    """One segment, at most, of every pool: they start at the same position and fill lanes of `length` tokens.

    `lanes` says where on a row each column's lane begins; a column that is not one of `columns` borrows another's,
    and writes what it computes to scratch blocks. `chunk_pages` [1, blocks] are the blocks of these tokens on each
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
    """Segments of many tokens: `rope` of all tokens of a row, and the rounds in which they attend."""

    places: Places
    rope: Rope
    rounds: list[PrefillRound]


@dataclasses.dataclass(frozen=True)
class DecodeBatch:
    """One token for each of `users` slots of every pool.

    `rope` is that of a row's tokens; `positions` [users] and `pages` [users, blocks], int32, are each chip's own.
    `kv_memory_config` lays out what they add to the cache, a core for each user, and `q_memory_config` their queries.
    """

    places: Places
    rope: Rope
    users: int
    positions: ttnn.Tensor
    pages: ttnn.Tensor
    kv_memory_config: ttnn.MemoryConfig
    q_memory_config: ttnn.MemoryConfig
