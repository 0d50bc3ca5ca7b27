"""Calls of ops on random inputs, for the embedded device and for ttnn's golden functions."""

import dataclasses
from collections.abc import Iterator

import torch

from stages.backend import embedded
from stages.backend.embedded import DataType, Layout

SILU = [embedded.UnaryOpType.SILU]


@dataclasses.dataclass(frozen=True)
class Held:
    """An operand with its dtype and layout; a float torch tensor without them is bfloat16 in TILE layout."""

    tensor: torch.Tensor
    dtype: DataType
    layout: Layout = embedded.TILE_LAYOUT


@dataclasses.dataclass(frozen=True)
class OnHost:
    """A torch tensor that is passed to an op as it is."""

    tensor: torch.Tensor


class Call:
    """A call of an op, by its name under `ttnn`, with its arguments."""

    def __init__(self, op: str, *arguments: object, **keywords: object) -> None:
        self.op = op
        self.arguments = arguments
        self.keywords = keywords


def integers(tensor: torch.Tensor, dtype: DataType = embedded.int32) -> Held:
    """An operand of integers: ids, positions or pages."""
    return Held(tensor, dtype, embedded.ROW_MAJOR_LAYOUT)


def calls(shape: tuple[int, int, int, int]) -> Iterator[Call]:
    """Calls of every op of one chip but attention, on random values of `shape`."""
    yield from _eltwise(shape)
    yield from _movement(shape)
    yield from _choices(shape)
    yield from _products(shape)
    yield from _tensors(shape)


def _eltwise(shape: tuple[int, ...]) -> Iterator[Call]:
    a, b = torch.randn(shape), torch.randn(shape)
    row, column = torch.randn(1, 1, 1, shape[-1]), torch.randn(1, shape[1], shape[2], 1)
    for op in ("add", "sub", "subtract", "mul", "multiply"):
        for other in (b, row, column, 2.5):
            yield Call(op, a, other)
    for op in ("div", "divide"):
        for other in (b.abs() + 0.5, row.abs() + 0.5, 2.5):
            yield Call(op, a, other)
    yield Call("mul", a, b, input_tensor_a_activations=SILU)
    yield Call("silu", a)
    yield Call("sigmoid", a)
    yield Call("typecast", a, embedded.float32)
    wide = torch.randn(shape) * 300
    for dtype in (embedded.uint8, embedded.uint16, embedded.uint32, embedded.int32):
        yield Call("typecast", wide, dtype)
    yield Call("typecast", Held(torch.randint(0, 60000, shape), embedded.uint16), embedded.uint32)
    yield Call("typecast", Held(torch.randint(0, 99999, shape), embedded.uint32), embedded.uint16)
    yield Call("typecast", Held(torch.randint(-128, 128, shape), embedded.int32), embedded.bfloat16)


def _movement(shape: tuple[int, ...]) -> Iterator[Call]:
    batch, heads, tokens, width = shape
    x = torch.randn(shape)
    yield Call("reshape", x, (batch, 1, heads * tokens, width))
    yield Call("permute", x, (0, 2, 1, 3))
    yield Call("permute", x, (0, 3, 2, 1))
    yield Call("transpose", x, -2, -1)
    yield Call("slice", x, [0, 0, 0, 8], [batch, heads, tokens, width])
    yield Call("slice", x, [0, 0, 2, 0], [batch, 1, tokens - 1, 7])
    yield Call("concat", [x, torch.randn(batch, heads, tokens, 24)], dim=-1)
    yield Call("concat", [x, torch.randn(batch, 2, tokens, width), x], dim=1)
    yield Call("split", x, width // 2, dim=3)
    yield Call("split", x, [3, tokens - 3], dim=2)
    yield Call("repeat", x, (1, 2, 3, 1))
    yield Call("pad", x, [(0, 0), (1, 0), (0, 3), (2, 2)], -7.0)
    yield Call("to_layout", x, embedded.ROW_MAJOR_LAYOUT)
    yield Call("to_memory_config", x, embedded.L1_MEMORY_CONFIG)
    yield Call("clone", x)
    yield Call("fill", x, -1.5)
    yield Call("copy", x, torch.zeros(shape))


def _choices(shape: tuple[int, ...]) -> Iterator[Call]:
    width = shape[-1]
    # The values are distinct, as equal ones could be chosen in any order.
    x = torch.argsort(torch.randn(shape), -1) / 8 - 2
    order = torch.argsort(torch.randn(shape), -1)[..., :5]
    index = Held(order, embedded.uint16)
    yield Call("gather", x, -1, index)
    yield Call("scatter", x, -1, index, torch.randn(*shape[:-1], 5))
    yield Call("embedding", integers(torch.randint(0, 50, (2, 7)), embedded.uint32), torch.randn(50, width))
    yield Call("sum", x, dim=-1, keepdim=True)
    yield Call("sum", x, dim=2)
    yield Call("sum", x, dim=(1, 2))
    yield Call("sum", x)
    yield Call("argmax", x, dim=-1)
    yield Call("argmax", x, dim=-1, keepdim=True)
    yield Call("topk", x, 8, dim=-1)
    yield Call("topk", x, 2, dim=-1)
    for dim in (-1, 2):
        yield Call("softmax", torch.randn(shape) * 5, dim=dim)


def _products(shape: tuple[int, ...]) -> Iterator[Call]:
    batch, heads, _, width = shape
    x, one = torch.randn(shape), torch.randn(1, 1, *shape[2:])
    weight, own = torch.randn(1, 1, width, 72), torch.randn(batch, heads, width, 48)
    yield Call("linear", x, weight)
    yield Call("linear", x, weight, activation="silu")
    yield Call("linear", x, own)
    yield Call("linear", one, torch.randn(1, 1, width, 8), dtype=embedded.float32)
    yield Call("matmul", x, own)
    yield Call("matmul", one, torch.randn(1, 6, width, 48))
    gamma = torch.randn(1, 1, 1, width)
    yield Call("rms_norm", x * 3, weight=gamma, epsilon=1e-3)
    yield Call("rms_norm_pre_all_gather", x * 3, dtype=embedded.float32)
    squares = torch.zeros(*shape[:-1], 32)
    squares[..., 0] = x.square().sum(-1) * 1.5
    yield Call("rms_norm_post_all_gather", x, squares, weight=gamma, epsilon=1e-3)


def _tensors(shape: tuple[int, ...]) -> Iterator[Call]:
    x = torch.randn(shape)
    for op in ("from_torch", "as_tensor"):
        yield Call(op, OnHost(x), embedded.float32, layout=embedded.TILE_LAYOUT)
        yield Call(op, OnHost(x * 9), embedded.int32)
    yield Call("full", shape, -1.5)
    yield Call("zeros", shape)
    yield Call("to_torch", x)
    yield Call("from_device", x)


def attention_calls(block_size: int) -> Iterator[Call]:
    """Calls of attention: of users at different positions over shuffled pages, and of chunks of one user."""
    heads, width, values, pages = 8, 96, 64, 128 // block_size
    lengths = torch.tensor([1, 31, 32, 33, 64, 100, 127])
    users = len(lengths)
    table = torch.randperm(users * pages + 3)[: users * pages].view(users, pages)
    cache = torch.randn(users * pages + 3, 1, block_size, width)
    for scale in (0.1, width**-0.5):
        yield Call(
            "transformer.paged_flash_multi_latent_attention_decode",
            torch.randn(1, users, heads, width),
            cache,
            head_dim_v=values,
            page_table_tensor=integers(table),
            cur_pos_tensor=integers(lengths - 1),
            scale=scale,
        )
        for start, tokens in ((0, 32), (32, 96), (64, 64)):
            yield Call(
                "transformer.chunked_flash_mla_prefill",
                torch.randn(1, heads, tokens, width),
                cache,
                values,
                integers(table[3:4]),
                start,
                scale=scale,
            )
