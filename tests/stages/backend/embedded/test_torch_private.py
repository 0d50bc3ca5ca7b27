"""The private names of torch do what the embedded device relies on, in the torch that is installed."""

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from stages.backend.embedded.torch_private import (
    HAS_ONEDNN,
    MULTIPLIES_BFLOAT16,
    blocked_product,
    pack_blocked,
    without_torch_function,
)


def test_onednn_is_found_where_torch_offers_it() -> None:
    assert torch.backends.mkldnn.is_available() is HAS_ONEDNN  # type: ignore[no-untyped-call]


@pytest.mark.skipif(not HAS_ONEDNN, reason="this torch has no oneDNN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_blocked_product_has_the_plain_ones_values(dtype: torch.dtype) -> None:
    if dtype is torch.bfloat16 and not MULTIPLIES_BFLOAT16:
        pytest.skip("this processor has no products of bfloat16")
    generator = torch.Generator().manual_seed(0)
    x, matrix = (torch.randn(rows, 64, generator=generator).to(dtype) for rows in (3, 96))
    product = blocked_product(x, pack_blocked(matrix))
    assert product.dtype is dtype
    torch.testing.assert_close(product, torch.nn.functional.linear(x, matrix))


def test_no_mode_sees_a_call_without_torch_function() -> None:
    seen: list[Any] = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    one = torch.ones(2)
    with Mode():
        with without_torch_function():
            torch.add(one, one)
        assert not seen
        torch.add(one, one)
    assert seen == [torch.add]
