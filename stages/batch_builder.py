"""Makes the device's inputs of steps: a step's tokens are laid out on one mesh, and padded where shapes must be few."""

from collections.abc import Sequence

import torch

from stages.backend import PADDED_USERS_PER_ROW, ttnn
from stages.backend.fused import ROWS_AT_ONCE, NormBuffers
from stages.batch import PADDING, CacheWrites, DecodeBatch, Place, PrefillBatch, PrefillGroup, TokenLayout
from stages.kv.page_tables import PageTables
from stages.models.registry import architecture_of
from stages.models.rope import Rope, RopeTables
from stages.step import Segment, Step
from stages.tensor_dtypes import TILE
from weights.model_config import ModelConfig
from weights.sizes import ceil_div, round_up

CORE_GRID = ttnn.CoreCoord(8, 8)
"""Cores of a Wormhole chip that a program may use."""


class BatchBuilder:
    """Makes the device's inputs of steps on one mesh."""

    def __init__(
        self,
        config: ModelConfig,
        mesh_device: ttnn.MeshDevice,
        tables: PageTables,
        rope: RopeTables,
        *,
        is_static: bool = False,
        users_per_row: int = PADDED_USERS_PER_ROW,
    ) -> None:
        """With `is_static`, page tables of decode steps all have the greatest width, as a trace needs them.

        With `users_per_row`, all steps are padded to few shapes, decode steps to at least that many tokens a row.
        """
        self._is_static = is_static or users_per_row > 0
        self._users_per_row = users_per_row
        self._kv_width = architecture_of(config).kv_cache_shape(config, tables.options)[-1]
        self._heads = config.num_attention_heads
        self._mesh_device = mesh_device
        self._tables = tables
        self._rope = rope
        self._rows, self._columns = tuple(mesh_device.shape)
        self._takes_all_shapes = self._rows * self._columns == 1 and not users_per_row
        self._layouts: dict[int, tuple[ttnn.MemoryConfig, ttnn.MemoryConfig]] = {}
        before, behind = (NormBuffers.on(mesh_device, config.hidden_size) for _ in range(2))
        self._norms = None if before is None or behind is None else (before, behind)

    def decode(self, step: Step) -> DecodeBatch:
        """Makes the inputs of a decode step, which has been applied to the page tables."""
        return self.decode_places(
            [
                Place(segment.slot, position)
                for segment in step.segments
                for position in range(segment.start, segment.start + len(segment.tokens))
            ]
        )

    def decode_places(self, places: Sequence[Place]) -> DecodeBatch:
        """Makes the inputs of single tokens at these places, in this order."""
        pools = self._by_pool([place.slot for place in places])
        users = self.users(max(len(pool) for pool in pools))
        lanes = [index for pool in pools for index in [*pool, *[PADDING] * (users - len(pool))]]
        padded = [Place(PADDING, 0) if index == PADDING else places[index] for index in lanes]
        positions = torch.tensor([place.position for place in padded], dtype=torch.int32)
        width = self._table_width(max(place.position for place in places) + 1)
        pages = self._tables.rows([place.slot for place in padded], width)
        kv_memory_config, q_memory_config = self._memory_configs(users)
        return DecodeBatch(
            layout=self._layout_of(torch.tensor(lanes).view(self._rows, -1)),
            rope=self._look_up(positions),
            users=users,
            positions=self._on_each_chip(positions),
            pages=self._on_each_chip(pages),
            kv_memory_config=kv_memory_config,
            q_memory_config=q_memory_config,
            writes=self._writes(positions, pages),
            norms=self._norms if users * self._columns <= ROWS_AT_ONCE else None,
        )

    def _writes(self, positions: torch.Tensor, pages: torch.Tensor) -> CacheWrites | None:
        """What a row's chips need to write with one op, given the lanes of all rows, row by row."""
        lanes = len(positions) // self._rows
        if self._columns == 1 or lanes > ROWS_AT_ONCE:
            return None
        of_chips = torch.full((self._rows, self._columns, self._columns, lanes // self._columns), -1, dtype=torch.int32)
        for column in range(self._columns):
            of_chips[:, column, column] = positions.view(self._rows, self._columns, -1)[:, column]
        mapper = ttnn.ShardTensor2dMesh(self._mesh_device, (self._rows, self._columns), (0, None))
        return CacheWrites(
            self._on_each_chip(of_chips.flatten()),
            self._integers(pages, ttnn.int32, mapper),
            self._over_cores(lanes, TILE),
        )

    def users(self, most: int) -> int:
        """Returns the number of lanes of every pool in a decode step whose fullest pool has `most` tokens."""
        if self._takes_all_shapes:
            return most
        return max(_power_of_two(most), ceil_div(self._users_per_row, self._columns))

    def prefill(self, step: Step) -> PrefillBatch:
        """Makes the inputs of a prefill step, which has been applied to the page tables."""
        begins = [0]
        for segment in step.segments:
            begins.append(begins[-1] + len(segment.tokens))
        tokens: list[torch.Tensor] = []
        positions: list[torch.Tensor] = []
        groups: list[PrefillGroup] = []
        width = 0
        for members in self._group_members(step.segments):
            group = self._group(members, step.segments, width)
            groups.append(group)
            for column in self._columns_of(members):
                lane_tokens, lane_positions = self._lane(members, column, step.segments, begins, group.length)
                tokens.append(lane_tokens)
                positions.append(lane_positions)
                width += group.length
        return PrefillBatch(
            layout=self._layout_of(torch.cat(tokens, dim=1)),
            rope=self._look_up(torch.cat(positions, dim=1)),
            groups=groups,
        )

    def ids(self, layout: TokenLayout, tokens: Sequence[int]) -> ttnn.Tensor:
        """Returns token ids, uint32 [1, tokens of the row] on each chip."""
        return self._on_each_row(layout.spread(torch.tensor(tokens, dtype=torch.int32))[None])

    def sources(self, layout: TokenLayout, tokens: Sequence[int], target: TokenLayout) -> ttnn.Tensor:
        """Returns where tokens of one layout lie, in the order of another: uint32 [1, width of `target`] on each row.

        `tokens` are indices of the first layout's, one for each token of the second, which lies on the same row.
        """
        at = layout.places()[torch.tensor(tokens)] % layout.width
        return self._on_each_row(target.spread(at.to(torch.int32))[None])

    def logit_indices(self, layout: TokenLayout, tokens: Sequence[int]) -> tuple[ttnn.Tensor, torch.Tensor]:
        """Returns which tokens of each row need logits, given those of the step: uint32 [1, n] on each row.

        `n` is the same on every row. The second result, int64 [tokens], has the index of each of `tokens` among the
        n * rows logits, row by row.
        """
        if layout.tokens is None and self._takes_all_shapes:
            return self._on_each_row(torch.tensor([tokens], dtype=torch.int32)), torch.arange(len(tokens))
        at = layout.places()[torch.tensor(tokens)]
        rows = at // layout.width
        counts = torch.bincount(rows, minlength=layout.rows)
        most = int(counts.max())
        if self._users_per_row:
            most = _whole_tiles(most)
        indices = torch.zeros(layout.rows, most, dtype=torch.int32)
        chosen = torch.empty(len(tokens), dtype=torch.long)
        for row in range(layout.rows):
            members = (rows == row).nonzero()[:, 0]
            indices[row, : len(members)] = (at[members] % layout.width).to(torch.int32)
            chosen[members] = row * most + torch.arange(len(members))
        return self._on_each_row(indices.view(1, -1)), chosen

    def hidden(self, layout: TokenLayout, hidden: torch.Tensor) -> ttnn.Tensor:
        """Returns hidden states [tokens, hidden] as [1, 1, tokens of the row, hidden / columns] on each chip."""
        return ttnn.from_torch(
            layout.spread(hidden)[None, None],
            dtype=ttnn.bfloat16,
            layout=ttnn.TILE_LAYOUT,
            device=self._mesh_device,
            mesh_mapper=ttnn.ShardTensor2dMesh(self._mesh_device, (self._rows, self._columns), (2, 3)),
        )

    def hidden_to_torch(self, layout: TokenLayout, hidden: ttnn.Tensor) -> torch.Tensor:
        """Returns hidden states on each chip as [tokens, hidden]: the inverse of `hidden`."""
        composer = ttnn.ConcatMesh2dToTensor(self._mesh_device, (self._rows, self._columns), (2, 3))
        return layout.collect(ttnn.to_torch(hidden, mesh_composer=composer)[0, 0])

    def _memory_configs(self, users: int) -> tuple[ttnn.MemoryConfig, ttnn.MemoryConfig]:
        """The layouts of what `users` of every pool add to the cache and of their queries, made once."""
        configs = self._layouts.get(users)
        if configs is None:
            configs = self._layouts[users] = self._over_cores(users, TILE), self._q_memory_config(users)
        return configs

    def _q_memory_config(self, users: int) -> ttnn.MemoryConfig:
        """A tile of heads for each core, or several where cores are too few: all 128 heads of R1 would overflow L1."""
        tiles = _whole_tiles(self._heads) // TILE
        heights = [height for height in range(1, tiles + 1) if tiles % height == 0]
        fits = [height for height in heights if users * tiles // height <= CORE_GRID.x * CORE_GRID.y]
        height = fits[0] if fits else tiles
        return self._over_cores(users * tiles // height, height * TILE)

    def _over_cores(self, cores: int, height: int) -> ttnn.MemoryConfig:
        """The layout of `height` vectors of the cache's width on each of `cores` cores."""
        return ttnn.create_sharded_memory_config(
            (height, _whole_tiles(self._kv_width)),
            core_grid=ttnn.num_cores_to_corerangeset(cores, CORE_GRID, row_wise=True),
            strategy=ttnn.ShardStrategy.HEIGHT,
            use_height_and_width_as_shard_shape=True,
        )

    def _by_pool(self, slots: Sequence[int]) -> list[list[int]]:
        pools: list[list[int]] = [[] for _ in range(self._rows * self._columns)]
        for index, slot in enumerate(slots):
            pools[self._tables.options.pool_of(slot)].append(index)
        return pools

    def _group_members(self, segments: Sequence[Segment]) -> list[dict[int, int]]:
        """Pool -> index of its segment, for each group: a segment joins the first group of its start with room."""
        groups: list[dict[int, int]] = []
        for index, segment in enumerate(segments):
            pool = self._tables.options.pool_of(segment.slot)
            for members in groups:
                start = segments[next(iter(members.values()))].start
                if pool not in members and start == segment.start:
                    members[pool] = index
                    break
            else:
                groups.append({pool: index})
        return groups

    def _columns_of(self, members: dict[int, int]) -> list[int]:
        return sorted({pool % self._columns for pool in members})

    def _group(self, members: dict[int, int], segments: Sequence[Segment], begin: int) -> PrefillGroup:
        chosen = [segments[index] for index in members.values()]
        start = chosen[0].start
        length = self._lane_length(start, max(len(segment.tokens) for segment in chosen))
        columns = self._columns_of(members)
        lane_of = {column: begin + lane * length for lane, column in enumerate(columns)}
        slots = [
            segments[members[pool]].slot if pool in members else PADDING for pool in range(self._rows * self._columns)
        ]
        block_size = self._tables.options.block_size
        blocks = ceil_div(start + length, block_size)
        pages = self._tables.rows(slots, self._table_width(start + length) if self._users_per_row else blocks)
        return PrefillGroup(
            start=start,
            length=length,
            lanes=[lane_of.get(column, begin) for column in range(self._columns)],
            columns=columns,
            chunk_pages=self._on_each_chip(pages[:, start // block_size : blocks]),
            pages=self._on_each_chip(pages),
        )

    def _lane_length(self, start: int, tokens: int) -> int:
        if self._takes_all_shapes:
            return tokens
        length = _whole_tiles(tokens)
        if not self._users_per_row:
            return length
        options = self._tables.options
        return min(_power_of_two(length), options.blocks_per_slot * options.block_size - start)

    def _lane(
        self,
        members: dict[int, int],
        column: int,
        segments: Sequence[Segment],
        begins: Sequence[int],
        length: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns token indices and positions, both [rows, length], of one column's lane on every row."""
        tokens = torch.full((self._rows, length), PADDING)
        positions = torch.zeros(self._rows, length, dtype=torch.int32)
        for row in range(self._rows):
            index = members.get(row * self._columns + column)
            if index is not None:
                segment = segments[index]
                count = len(segment.tokens)
                tokens[row, :count] = torch.arange(begins[index], begins[index] + count)
                positions[row, :count] = torch.arange(segment.start, segment.start + count)
        return tokens, positions

    def _layout_of(self, tokens: torch.Tensor) -> TokenLayout:
        rows, width = tokens.shape
        return TokenLayout(rows, width, None if self._takes_all_shapes else tokens.flatten())

    def _table_width(self, tokens: int) -> int:
        options = self._tables.options
        grows = self._takes_all_shapes and not self._is_static
        return ceil_div(tokens, options.block_size) if grows else options.blocks_per_slot

    def _look_up(self, positions: torch.Tensor) -> Rope:
        return self._rope.look_up(self._on_each_row(positions.view(1, -1)))

    def _on_each_row(self, values: torch.Tensor) -> ttnn.Tensor:
        """[1, rows * width] -> uint32 [1, width] on each row's chips."""
        mapper = ttnn.ShardTensor2dMesh(self._mesh_device, (self._rows, self._columns), (1, None))
        return self._integers(values, ttnn.uint32, mapper)

    def _on_each_chip(self, values: torch.Tensor) -> ttnn.Tensor:
        """[chips * n, ...] -> int32 [n, ...] on each chip, in row-major order of chips."""
        return self._integers(values, ttnn.int32, ttnn.ShardTensorToMesh(self._mesh_device, dim=0))

    def _integers(self, values: torch.Tensor, dtype: ttnn.DataType, mapper: ttnn.TensorToMesh) -> ttnn.Tensor:
        return ttnn.from_torch(
            values, dtype=dtype, layout=ttnn.ROW_MAJOR_LAYOUT, device=self._mesh_device, mesh_mapper=mapper
        )


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _whole_tiles(count: int) -> int:
    return round_up(count, TILE)
