"""The tests of the modules on mock Galaxies can fail: every mistake that is planted here makes them fail."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stages.backend import composite, fused, ttnn
from stages.batch_builder import BatchBuilder
from stages.models.deepseek_v3.decoder_block import MoEBlock
from stages.models.deepseek_v3.mla import MLA
from stages.models.deepseek_v3.mlp import MLP
from stages.models.deepseek_v3.moe import MoE
from stages.models.deepseek_v3.weight_specs import INPUTS, OUTPUTS, attention_weights
from stages.step import Mode
from tests.galaxy import modules
from tests.galaxy.meshes import opened
from tests.galaxy.r1 import COLUMNS, R1, FullSteps

ROWS = 4

Plant = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def steps() -> Iterator[FullSteps]:
    with opened(ROWS, COLUMNS) as mesh:
        yield FullSteps.on(mesh)


def gathered_over_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong axis: hidden states are concatenated with those of other tokens."""
    true_gather = composite.all_gather
    monkeypatch.setattr(
        composite, "all_gather", lambda x, dim, **options: true_gather(x, dim, **{**options, "cluster_axis": 0})
    )
    monkeypatch.setattr(fused, "COLUMNS", 0)


def weights_cut_along_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong axis: the output projection is cut along the dimension that is not summed over."""
    specs = attention_weights(R1)
    assert specs["wo"].dims == (None, INPUTS)
    monkeypatch.setitem(modules.SPECS, MLA, {**specs, "wo": specs["wo"]._replace(dims=(None, OUTPUTS))})


def page_tables_without_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong dtype: page tables as uint32."""
    true_integers = BatchBuilder._integers
    monkeypatch.setattr(
        BatchBuilder,
        "_integers",
        lambda self, values, _dtype, mapper: true_integers(self, values, ttnn.uint32, mapper),
    )


def cache_of_another_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong dtype: values are not converted to the cache's dtype."""
    monkeypatch.setattr(ttnn, "typecast", lambda x, _dtype: x)


def no_gather_of_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing collective: the feed-forward network gets only its column's part of the hidden states."""
    monkeypatch.setattr(composite, "all_gather", lambda x, _dim, **_options: x)
    monkeypatch.setattr(fused, "semaphores", lambda _mesh_device: [])


def no_reduce_scatter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing collective: each column keeps its own part of a sum."""
    monkeypatch.setattr(composite, "reduce_scatter", lambda x, _dim, **_options: x)


def no_exchange_of_heads_for_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing collective: attention gets the heads of its column for all users of the row."""
    monkeypatch.setattr(composite, "all_to_all", lambda x, **_options: x)


CASES: list[tuple[Plant, Any, Mode]] = [
    (gathered_over_rows, MLP, "prefill"),
    (gathered_over_rows, MoE, "decode"),
    (weights_cut_along_outputs, MLA, "decode"),
    (page_tables_without_sign, MLA, "prefill"),
    (page_tables_without_sign, MLA, "decode"),
    (cache_of_another_dtype, MLA, "prefill"),
    (no_gather_of_hidden_states, MLP, "decode"),
    (no_reduce_scatter, MLA, "prefill"),
    (no_reduce_scatter, MoEBlock, "decode"),
    (no_exchange_of_heads_for_users, MLA, "decode"),
]


@pytest.mark.parametrize(
    ("plant", "module", "mode"), CASES, ids=[f"{plant.__name__}-{module.__name__}" for plant, module, _ in CASES]
)
def test_a_mistake_is_found(
    plant: Plant, module: Any, mode: Mode, steps: FullSteps, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules.check_module(module, mode, steps)
    plant(monkeypatch)
    # The inputs on the mesh have to be made with the mistake too.
    with pytest.raises((RuntimeError, TypeError, AssertionError)):
        modules.check_module(module, mode, FullSteps.on(steps.mesh))
