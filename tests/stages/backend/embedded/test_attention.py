"""The paged latent cache and attention over it, against attention written out for each user and head."""

import math
import sys
from collections.abc import Callable

import pytest
import torch

from stages.backend import set_float_dtype, ttnn
from stages.backend.embedded import paging, transformer
from stages.backend.embedded import products as processor
from stages.errors import DeviceError
from tests.support.embedded_meshes import integers, on_chip, on_meshes, put, shards
from tests.support.op_cases.case import user_cores

pytestmark = pytest.mark.usefixtures("float32")

WIDTH, VALUES, HEADS, SCALE = 96, 64, 4, 0.17

update_cache = ttnn.experimental.paged_update_cache
fill_cache = ttnn.experimental.paged_fill_cache
decode = ttnn.transformer.paged_flash_multi_latent_attention_decode
prefill = ttnn.transformer.chunked_flash_mla_prefill


def on_cores(vectors: ttnn.Tensor) -> ttnn.Tensor:
    """Puts vectors [1, users, 1, WIDTH] on the mesh in the form that the cache takes."""
    return ttnn.to_memory_config(vectors, user_cores(vectors.shape[1], WIDTH))


def attend(query: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Attention of one head's query [WIDTH] over latents [n, WIDTH], in float64."""
    scores = (latents.double() @ query.double()) * SCALE
    weights = [math.exp(score - float(scores.max())) for score in scores.tolist()]
    return (torch.tensor(weights, dtype=torch.float64) / sum(weights)) @ latents[:, :VALUES].double()


def shuffled_pages(users: int, pages: int) -> torch.Tensor:
    """A page table over all blocks of a cache in random order, with more blocks than pages."""
    return torch.randperm(users * pages + 3)[: users * pages].view(users, pages)


def paged(latents: list[torch.Tensor], table: torch.Tensor, block_size: int) -> torch.Tensor:
    """A cache [blocks, 1, block_size, WIDTH] with each user's latents where its pages say, noise elsewhere."""
    cache = torch.randn(table.numel() + 3, 1, block_size, WIDTH) * 9
    for user, own in enumerate(latents):
        for position, latent in enumerate(own):
            cache[table[user, position // block_size], 0, position % block_size] = latent
    return cache


@on_meshes
@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize(
    "lengths", [[1, 32, 33, 64, 90, 7], [40] * 6, [0, 50, 0, 128, 2, 31]], ids=["varied", "equal", "idle"]
)
def test_decode(mesh: ttnn.MeshDevice, block_size: int, lengths: list[int]) -> None:
    latents = [torch.randn(length, WIDTH) for length in lengths]
    table = shuffled_pages(len(lengths), 128 // block_size)
    cache = put(mesh, paged(latents, table, block_size))
    # The page table beyond a user's length must have no effect.
    for user, length in enumerate(lengths):
        table[user, -(-length // block_size) :] = -1
    q = torch.randn(1, len(lengths), HEADS, WIDTH)
    positions = integers(mesh, torch.tensor(lengths) - 1)
    for _ in range(2):
        attended = decode(
            put(mesh, q),
            cache,
            head_dim_v=VALUES,
            page_table_tensor=integers(mesh, table),
            cur_pos_tensor=positions,
            scale=SCALE,
        )
        for shard in shards(attended):
            assert shard.shape == (1, len(lengths), HEADS, VALUES)
            for user, own in enumerate(latents):
                for head in range(HEADS):
                    expected = attend(q[0, user, head], own).float() if len(own) else torch.zeros(VALUES)
                    torch.testing.assert_close(shard[0, user, head], expected, rtol=2e-6, atol=2e-6)


@on_chip
def test_decode_in_many_buckets_and_with_the_usual_scale(
    mesh: ttnn.MeshDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paging, "LATENTS_AT_ONCE", 100 * WIDTH)
    lengths = [30, 31, 32, 60, 61, 90, 45, 1]
    latents = [torch.randn(length, WIDTH) for length in lengths]
    table = shuffled_pages(len(lengths), 3)
    q = torch.randn(1, len(lengths), HEADS, WIDTH)
    attended = decode(
        put(mesh, q * (SCALE * WIDTH**0.5)),
        put(mesh, paged(latents, table, 32)),
        head_dim_v=VALUES,
        page_table_tensor=integers(mesh, table),
        cur_pos_tensor=integers(mesh, torch.tensor(lengths) - 1),
    )
    for user, own in enumerate(latents):
        expected = torch.stack([attend(q[0, user, head], own) for head in range(HEADS)]).float()
        torch.testing.assert_close(shards(attended)[0][0, user], expected, rtol=1e-5, atol=1e-5)


@on_chip
@pytest.mark.parametrize(("lanes", "together"), [([3, 3, 3], 3), ([1, 3, 2], 1)], ids=["even", "uneven"])
def test_drafts_read_the_blocks_of_their_request_once(mesh: ttnn.MeshDevice, lanes: list[int], together: int) -> None:
    latents = [torch.randn(length, WIDTH) for length in (66, 63, 65)]
    own = shuffled_pages(len(latents), 3)
    cache = put(mesh, paged(latents, own, 32))
    lengths = [len(latents[request]) - lane for request, count in enumerate(lanes) for lane in reversed(range(count))]
    requests = [request for request, count in enumerate(lanes) for _ in range(count)]
    table, positions = integers(mesh, own[requests]), integers(mesh, torch.tensor(lengths) - 1)
    q = torch.randn(1, len(lengths), HEADS, WIDTH)
    attended = decode(
        put(mesh, q), cache, head_dim_v=VALUES, page_table_tensor=table, cur_pos_tensor=positions, scale=SCALE
    )
    for user, (request, length) in enumerate(zip(requests, lengths, strict=True)):
        for head in range(HEADS):
            expected = attend(q[0, user, head], latents[request][:length]).float()
            torch.testing.assert_close(shards(attended)[0][0, user, head], expected, rtol=2e-6, atol=2e-6)
    [bucket] = paging.decode_pages("decode", positions, table, cache)[0].buckets
    assert (bucket.lanes, len(bucket.blocks)) == (together, 3 * len(lengths) // together)


@on_chip
def test_buckets_pad_no_user_by_more_than_a_third_and_stay_small(mesh: ttnn.MeshDevice) -> None:
    lengths = torch.randint(0, 1000, (64,))
    positions, table = integers(mesh, lengths - 1), integers(mesh, shuffled_pages(64, 32))
    cache = put(mesh, torch.zeros(8, 1, 32, 576))
    buckets = paging.decode_pages("decode", positions, table, cache)[0].buckets
    groups = [bucket.users for bucket in buckets if bucket.users is not None]
    assert len(groups) == len(buckets)
    users = [user for group in groups for user in group.tolist()]
    assert sorted(users) == lengths.nonzero().flatten().tolist()
    for bucket, group in zip(buckets, groups, strict=True):
        own = lengths[group]
        assert int(own.max()) == bucket.longest
        assert int(own.min()) * 4 >= bucket.longest * 3
        assert len(own) == 1 or len(own) * bucket.longest * 576 <= paging.LATENTS_AT_ONCE
    assert len(buckets) < len(users) / 2


@on_meshes
@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize(("start", "tokens"), [(0, 1), (0, 70), (64, 33), (96, 32)])
@pytest.mark.parametrize("scores_at_once", [1 << 22, 1000], ids=["whole", "pieces"])
def test_prefill(
    mesh: ttnn.MeshDevice,
    block_size: int,
    start: int,
    tokens: int,
    scores_at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transformer, "SCORES_AT_ONCE", scores_at_once)
    latents = torch.randn(start + tokens, WIDTH)
    table = shuffled_pages(1, 192 // block_size)
    cache = put(mesh, paged([latents], table, block_size))
    q = torch.randn(1, HEADS, tokens, WIDTH)
    attended = prefill(put(mesh, q), cache, VALUES, integers(mesh, table), start, scale=SCALE)
    for shard in shards(attended):
        for t in range(0, tokens, 7):
            expected = torch.stack([attend(q[0, head, t], latents[: start + t + 1]) for head in range(HEADS)])
            torch.testing.assert_close(shard[0, :, t], expected.float(), rtol=2e-6, atol=2e-6)


@on_chip
def test_prefill_and_decode_agree(mesh: ttnn.MeshDevice) -> None:
    latents, table = torch.randn(150, WIDTH), shuffled_pages(1, 5)
    cache = put(mesh, paged([latents], table, 32))
    q = torch.randn(1, HEADS, 150, WIDTH)
    chunk = shards(prefill(put(mesh, q), cache, VALUES, integers(mesh, table), 0, scale=SCALE))[0]
    every = decode(
        put(mesh, q.transpose(1, 2)),
        cache,
        head_dim_v=VALUES,
        page_table_tensor=integers(mesh, table.expand(150, -1)),
        cur_pos_tensor=integers(mesh, torch.arange(150)),
        scale=SCALE,
    )
    one_by_one = shards(every)[0].transpose(1, 2)
    assert float((chunk - one_by_one).abs().max() / chunk.abs().max()) < 1e-6


@pytest.fixture(params=[1, sys.maxsize], ids=["widened", "as it is"])
def either_processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiplies bfloat16 as on processors with instructions for it, and without."""
    monkeypatch.setattr(processor, "WIDE_FROM_ROWS", request.param)


@on_chip
@pytest.mark.usefixtures("either_processor")
def test_bfloat16_prefill_softens_in_float32(mesh: ttnn.MeshDevice) -> None:
    set_float_dtype(torch.bfloat16)
    latents, table = torch.randn(72, WIDTH).bfloat16(), shuffled_pages(1, 3)
    q = torch.randn(1, HEADS, 40, WIDTH).bfloat16()
    cache = put(mesh, paged([latents], table, 32))
    attended = shards(prefill(put(mesh, q), cache, VALUES, integers(mesh, table), 32, scale=SCALE))[0]
    assert attended.dtype == torch.bfloat16
    for t in range(40):
        expected = torch.stack([attend(q[0, head, t], latents[: 33 + t]) for head in range(HEADS)])
        torch.testing.assert_close(attended[0, :, t].double(), expected, rtol=0.02, atol=0.02)


@on_chip
@pytest.mark.usefixtures("either_processor")
def test_bfloat16_attention_softens_in_float32(mesh: ttnn.MeshDevice) -> None:
    set_float_dtype(torch.bfloat16)
    latents, table = torch.randn(100, WIDTH).bfloat16(), shuffled_pages(1, 4)
    cache = put(mesh, paged([latents], table, 32))
    q = torch.randn(1, 1, HEADS, WIDTH).bfloat16()
    attended = decode(
        put(mesh, q),
        cache,
        head_dim_v=VALUES,
        page_table_tensor=integers(mesh, table),
        cur_pos_tensor=integers(mesh, torch.tensor([99])),
        scale=SCALE,
    )
    expected = torch.stack([attend(q[0, 0, head], latents) for head in range(HEADS)])
    torch.testing.assert_close(shards(attended)[0][0, 0].double(), expected, rtol=0.02, atol=0.02)


@on_meshes
@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("rows", [1, 32])
def test_update_writes_each_users_position_and_nothing_else(mesh: ttnn.MeshDevice, block_size: int, rows: int) -> None:
    positions = torch.tensor([0, -1, 31, 32, 127, 64])
    table = shuffled_pages(6, 128 // block_size)
    before = torch.randn(table.numel() + 3, 1, block_size, WIDTH)
    vectors = torch.randn(1, 6, rows, WIDTH)
    expected = before.clone()
    for user, position in enumerate(positions.tolist()):
        if position >= 0:
            expected[table[user, position // block_size], 0, position % block_size] = vectors[0, user, 0]
    cache = put(mesh, before.clone())
    returned = update_cache(
        cache,
        on_cores(put(mesh, vectors)),
        update_idxs_tensor=integers(mesh, positions),
        page_table=integers(mesh, table),
    )
    assert returned is cache
    for shard in shards(cache):
        assert torch.equal(shard, expected)


@on_meshes
@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("tokens", [1, 32, 64, 100])
def test_fill_writes_the_chunks_blocks_and_nothing_else(mesh: ttnn.MeshDevice, block_size: int, tokens: int) -> None:
    table = shuffled_pages(3, 128 // block_size)
    before = torch.randn(table.numel() + 3, 1, block_size, WIDTH)
    chunk = torch.randn(1, 1, tokens, WIDTH)
    expected = before.clone()
    for position in range(tokens):
        expected[table[2, position // block_size], 0, position % block_size] = chunk[0, 0, position]
    cache = put(mesh, before.clone(), dtype=ttnn.bfloat8_b)
    returned = fill_cache(cache, put(mesh, chunk, dtype=ttnn.bfloat8_b), integers(mesh, table), batch_idx=2)
    assert returned is cache
    for shard in shards(cache):
        assert torch.equal(shard, expected)


def test_chips_with_their_own_users_part_a_cache_that_was_made_as_one() -> None:
    mesh = ttnn.open_mesh_device(ttnn.MeshShape(2, 4))
    cache = ttnn.zeros((4, 1, 32, WIDTH), dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT, device=mesh)
    own = torch.randn(1, 4, 1, WIDTH)
    where, table = integers(mesh, torch.tensor([5])), integers(mesh, torch.tensor([[3, 1]]))
    for _ in range(2):
        update_cache(cache, on_cores(put(mesh, own, (None, 1))), update_idxs_tensor=where, page_table=table)
    assert len({shard.data_ptr() for shard in shards(cache)}) == 4
    for number, shard in enumerate(shards(cache)):
        expected = torch.zeros(4, 1, 32, WIDTH)
        expected[3, 0, 5] = own[0, number % 4, 0]
        assert torch.equal(shard, expected)


def test_chips_that_share_all_write_once(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = ttnn.open_mesh_device(ttnn.MeshShape(2, 4))
    cache = ttnn.zeros((4, 1, 32, WIDTH), dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT, device=mesh)
    calls = 0
    plain_copy = torch.Tensor.index_copy_

    def counting(into: torch.Tensor, dim: int, index: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return plain_copy(into, dim, index, values)

    monkeypatch.setattr(torch.Tensor, "index_copy_", counting)
    where, table = integers(mesh, torch.tensor([5])), integers(mesh, torch.tensor([[3, 1]]))
    update_cache(cache, on_cores(put(mesh, torch.randn(1, 1, 1, WIDTH))), update_idxs_tensor=where, page_table=table)
    fill_cache(cache, put(mesh, torch.randn(1, 1, 32, WIDTH)), table, batch_idx=0)
    assert calls == 2


def _decode_with(mesh: ttnn.MeshDevice, **changes: object) -> None:
    given: dict[str, object] = {
        "q": torch.zeros(1, 2, HEADS, WIDTH),
        "values": VALUES,
        "positions": torch.tensor([5, 40]),
        "table": torch.tensor([[0, 1], [2, 3]]),
        "dtype": ttnn.int32,
    } | changes
    q, positions, table, values, dtype = (given[key] for key in ("q", "positions", "table", "values", "dtype"))
    assert isinstance(q, torch.Tensor)
    assert isinstance(positions, torch.Tensor)
    assert isinstance(table, torch.Tensor)
    assert isinstance(values, int)
    assert isinstance(dtype, ttnn.DataType)
    decode(
        put(mesh, q),
        put(mesh, torch.zeros(4, 1, 32, WIDTH)),
        head_dim_v=values,
        page_table_tensor=integers(mesh, table, dtype),
        cur_pos_tensor=integers(mesh, positions, dtype),
        scale=SCALE,
    )


@on_meshes
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(1, 3, HEADS, WIDTH)}, "with a position for each user"),
        ({"table": torch.tensor([[0, 1]])}, r"positions \[users\] and a page table"),
        ({"positions": torch.tensor([5, 64])}, "2 blocks of 32 does not reach position 64"),
        ({"table": torch.tensor([[0, 1], [2, 4]])}, "out of"),
        ({"table": torch.tensor([[0, 1], [2, -1]])}, "out of"),
        ({"dtype": ttnn.uint32}, "must be int32"),
        ({"values": 128}, "head_dim_v 128"),
        ({"values": 50}, "head_dim_v 50"),
        ({"q": torch.zeros(1, 2, HEADS, WIDTH - 32)}, r"q \[\.\.\., width\] and a cache"),
    ],
)
def test_decode_refuses(mesh: ttnn.MeshDevice, changes: dict[str, object], message: str) -> None:
    _decode_with(mesh)
    with pytest.raises(DeviceError, match=message):
        _decode_with(mesh, **changes)


@on_meshes
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, c: prefill(_q(m), c, VALUES, _table(m), 16), "chunk start 16 is not a multiple of 32"),
        (lambda m, c: prefill(_q(m), c, VALUES, _table(m), -32), "chunk start -32"),
        (lambda m, c: prefill(_q(m), c, 128, _table(m), 0), "head_dim_v 128"),
        (lambda m, c: prefill(_q(m), c, VALUES, _table(m), 64), r"does not hold 96 tokens"),
        (lambda m, c: prefill(_q(m), c, VALUES, _table(m, ttnn.uint32), 0), "int32 page table"),
        (lambda m, c: prefill(_q(m), c, VALUES, integers(m, torch.tensor([[0, 9]])), 32), "out of"),
        (lambda m, c: fill_cache(c, _chunk(m, 96), _table(m)), "does not hold 96 tokens"),
        (lambda m, c: fill_cache(c, _chunk(m, 32), _table(m), batch_idx=1), "of user 1"),
        (lambda m, c: fill_cache(c, _chunk(m, 32, ttnn.bfloat8_b), _table(m)), "the cache's dtype"),
        (lambda m, c: fill_cache(c, _chunk(m, 32), integers(m, torch.tensor([[9]]))), "paged_fill_cache refuses"),
        (lambda m, c: fill_cache(c, put(m, torch.zeros(1, 1, 32, 64)), _table(m)), "the cache's width"),
        (lambda m, c: _update(m, c, users=2), "with a position for each user"),
        (lambda m, c: _update(m, c, dtype=ttnn.bfloat8_b), "bfloat16 or float32, not BFLOAT8_B"),
        (lambda m, c: _update(m, c, position=64), "does not reach position 64"),
    ],
)
def test_prefill_and_cache_writes_refuse(
    mesh: ttnn.MeshDevice, call: Callable[[ttnn.MeshDevice, ttnn.Tensor], ttnn.Tensor], message: str
) -> None:
    cache = put(mesh, torch.zeros(4, 1, 32, WIDTH))
    with pytest.raises(DeviceError, match=message):
        call(mesh, cache)


def _q(mesh: ttnn.MeshDevice) -> ttnn.Tensor:
    return put(mesh, torch.zeros(1, HEADS, 32, WIDTH))


def _table(mesh: ttnn.MeshDevice, dtype: ttnn.DataType = ttnn.int32) -> ttnn.Tensor:
    return integers(mesh, torch.tensor([[2, 0]]), dtype)


def _chunk(mesh: ttnn.MeshDevice, tokens: int, dtype: ttnn.DataType = ttnn.bfloat16) -> ttnn.Tensor:
    return put(mesh, torch.zeros(1, 1, tokens, WIDTH), dtype=dtype)


def _update(
    mesh: ttnn.MeshDevice,
    cache: ttnn.Tensor,
    users: int = 1,
    dtype: ttnn.DataType = ttnn.bfloat16,
    position: int = 3,
) -> ttnn.Tensor:
    vectors = on_cores(put(mesh, torch.zeros(1, users, 1, WIDTH), dtype=dtype))
    where = integers(mesh, torch.tensor([position]))
    return update_cache(cache, vectors, update_idxs_tensor=where, page_table=_table(mesh))


@on_chip
def test_tensors_of_another_mesh_are_refused(mesh: ttnn.MeshDevice) -> None:
    other = ttnn.open_mesh_device(ttnn.MeshShape(1, 1))
    cache = put(mesh, torch.zeros(4, 1, 32, WIDTH))
    calls: list[Callable[[], ttnn.Tensor]] = [
        lambda: prefill(_q(other), cache, VALUES, _table(mesh), 0),
        lambda: prefill(_q(mesh), cache, VALUES, _table(other), 0),
        lambda: fill_cache(cache, _chunk(mesh, 32), _table(other)),
        lambda: _update(other, cache),
        lambda: decode(
            put(mesh, torch.zeros(1, 1, HEADS, WIDTH)),
            cache,
            head_dim_v=VALUES,
            page_table_tensor=_table(mesh),
            cur_pos_tensor=integers(other, torch.tensor([3])),
        ),
    ]
    for call in calls:
        with pytest.raises(DeviceError, match="different meshes"):
            call()
