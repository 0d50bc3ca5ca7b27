"""The activation memory that plans predict, against what ttnn allocates for the modules."""

import pytest

from stages.capacity.chip_memory import Activations, chip_memory
from stages.wormhole import L1_BYTES
from tests.galaxy.empty_block import EmptyBlock, peak_bytes
from tests.galaxy.meshes import opened
from tests.support.plans import deployment, r1_config

R1 = r1_config()
DENSE, MIXTURE = 0, 3
TOLERANCE = 0.05


@pytest.mark.parametrize(
    ("rows", "layer", "tokens"),
    # The tokens of the last one pass the experts in two parts.
    [(1, MIXTURE, 256), (4, MIXTURE, 256), (4, DENSE, 256), (4, MIXTURE, 1024)],
)
def test_of_a_prefill_step(rows: int, layer: int, tokens: int) -> None:
    plan = deployment(1, rows, microbatches=1)
    made = Activations(R1, rows, tokens)
    parts = (made.attention(), made.feed_forward(layer))
    with opened(rows, 8) as mesh:
        peak = peak_bytes(EmptyBlock(R1, plan, layer, mesh).prefill(tokens), "DRAM")
    assert peak == pytest.approx(max(sum(tensor.bytes for tensor in part) for part in parts), rel=TOLERANCE)


@pytest.mark.parametrize("rows", [1, 4])
def test_of_a_prefill_step_of_the_layer_that_drafts(rows: int) -> None:
    plan = deployment(1, rows, microbatches=1)
    made = Activations(R1, rows, 256)
    parts = ([*part, *made.draft()] for part in (made.attention(), made.feed_forward(R1.num_hidden_layers)))
    with opened(rows, 8) as mesh:
        peak = peak_bytes(EmptyBlock(R1, plan, R1.num_hidden_layers, mesh, drafts=True).prefill(256), "DRAM")
    assert peak == pytest.approx(max(sum(tensor.bytes for tensor in part) for part in parts), rel=TOLERANCE)


@pytest.mark.parametrize(("rows", "users"), [(1, 32), (4, 32), (1, 64)])
def test_of_a_decode_step_in_l1(rows: int, users: int) -> None:
    plan = deployment(1, rows, microbatches=1)
    planned = sum(tensor.bytes for tensor in Activations(R1, rows, users).feed_forward(MIXTURE))
    with opened(rows, 8) as mesh:
        peak = peak_bytes(EmptyBlock(R1, plan, MIXTURE, mesh).decode_feed_forward(users), "L1")
    assert peak == pytest.approx(planned, rel=TOLERANCE)
    assert peak < L1_BYTES


def test_a_decode_step_that_is_refused_has_no_room() -> None:
    [memory] = chip_memory(R1, deployment(1, 2, microbatches=1, users_per_row=256))
    assert memory.decode_l1 > memory.available_l1
    with opened(2, 8) as mesh, pytest.raises(RuntimeError, match="Out of Memory"):
        EmptyBlock(R1, deployment(1, 2, microbatches=1), MIXTURE, mesh).decode_feed_forward(256)
