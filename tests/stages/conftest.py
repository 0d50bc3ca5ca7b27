"""Fixtures that the tests of stages share."""

from collections.abc import Iterator

import pytest
import torch

from stages.backend import set_float_dtype, ttnn
from stages.backend.embedded.dtype import held_in


@pytest.fixture
def float32() -> Iterator[None]:
    """Values are compared in float32; a fixed seed makes them the same in every run."""
    before = held_in(ttnn.bfloat16)
    set_float_dtype(torch.float32)
    torch.manual_seed(0)
    yield
    set_float_dtype(before)
