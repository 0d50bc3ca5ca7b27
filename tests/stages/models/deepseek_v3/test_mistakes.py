"""The comparison with transformers can fail: every mistake planted here makes it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV3ForCausalLM

from stages.backend import composite, ttnn
from stages.batch_builder import BatchBuilder
from stages.kv.page_tables import PageTables
from stages.models.deepseek_v3 import mla, moe, rope
from stages.models.deepseek_v3 import mla as mla_weights
from stages.models.deepseek_v3.lm_head import LMHead
from stages.models.deepseek_v3.mlp import MLP
from tests.support.checkpoints import config_keys, reference_model, write_checkpoint
from tests.support.model_errors import TINY, TOLERANCE, worst_error
from tests.support.stage_driver import Driver, cache_options, stage_options
from weights.model_config import ModelConfig

MODEL: dict[str, Any] = {
    **TINY,
    "rope_scaling": {
        **config_keys()["rope_scaling"],
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 64,
    },
}

Plant = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("mistakes") / "model", overrides=MODEL)


@pytest.fixture(scope="module")
def reference(model: Path) -> DeepseekV3ForCausalLM:
    return reference_model(model)


def softmax_scale_without_mscale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelConfig, "softmax_scale", property(lambda config: config.qk_head_dim**-0.5))


def tables_without_mscale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rope, "yarn_mscale", lambda _factor, _mscale: 1.0)


def no_interpolation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rope, "correction_range", lambda _yarn, width, _theta: (width, width + 1))


def angles_for_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    true_tables = rope.cos_sin

    def halves(config: ModelConfig, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = true_tables(config, positions)
        return cos[:, ::2].repeat(1, 2), sin[:, ::2].repeat(1, 2)

    monkeypatch.setattr(rope, "cos_sin", halves)


def large_latent_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mla, "LATENT_EPSILON", 1e-2)


def keys_for_values(monkeypatch: pytest.MonkeyPatch) -> None:
    true_projection = mla_weights.key_projection
    monkeypatch.setattr(
        mla_weights, "value_projection", lambda config, state: true_projection(config, state).transpose(2, 3)
    )


def bias_in_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    true_gate = composite.moe_gate

    def gate(logits: ttnn.Tensor, bias: ttnn.Tensor, **route: Any) -> tuple[ttnn.Tensor, ttnn.Tensor]:
        _, indices = true_gate(logits, bias, **route)
        biased = ttnn.add(ttnn.sigmoid(logits), bias)
        weights = ttnn.gather(biased, -1, index=indices)
        weights = ttnn.div(weights, ttnn.sum(weights, dim=-1, keepdim=True))
        return ttnn.mul(weights, route["route_scale"]), indices

    monkeypatch.setattr(composite, "moe_gate", gate)


def choice_without_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    true_gate = composite.moe_gate
    monkeypatch.setattr(
        composite, "moe_gate", lambda logits, bias, **route: true_gate(logits, ttnn.mul(bias, 0.0), **route)
    )


def unscaled_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    true_gate = composite.moe_gate
    monkeypatch.setattr(
        composite,
        "moe_gate",
        lambda logits, bias, **route: true_gate(logits, bias, **{**route, "route_scale": 1.0}),
    )


def no_shared_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoMLP(MLP):
        @classmethod
        def forward_partial(cls, x: ttnn.Tensor, cfg: Any) -> ttnn.Tensor:
            return ttnn.mul(x, 0.0)

    monkeypatch.setattr(moe, "MLP", NoMLP)


def pages_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    true_prefill = BatchBuilder.prefill

    def prefill(self: BatchBuilder, step: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            true_rows = PageTables.rows
            patch.setattr(PageTables, "rows", lambda tables, *which: true_rows(tables, *which).sort(dim=1).values)
            return true_prefill(self, step)

    monkeypatch.setattr(BatchBuilder, "prefill", prefill)


def logits_of_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    true_pick = LMHead.pick
    monkeypatch.setattr(
        LMHead, "pick", lambda x, cfg, picks: true_pick(x, cfg, ttnn.typecast(ttnn.mul(picks, 0), ttnn.uint32))
    )


def caches_of_the_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    def partition(x: ttnn.Tensor, dim: int, *, cluster_axis: int, **_: Any) -> ttnn.Tensor:
        right = ttnn.mesh_partition(x, dim, cluster_axis)
        return ttnn.Tensor(right.shards[::-1], right.dtype, right.layout, right.mesh)

    monkeypatch.setattr(composite, "mesh_partition", partition)


def heads_of_the_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    true_exchange = composite.all_to_all

    def exchange(x: ttnn.Tensor, **options: Any) -> ttnn.Tensor:
        right = true_exchange(x, **options)
        turned = options["in_dim"] == 1
        return ttnn.Tensor(right.shards[::-1], right.dtype, right.layout, right.mesh) if turned else right

    monkeypatch.setattr(composite, "all_to_all", exchange)


def sums_of_one_column(monkeypatch: pytest.MonkeyPatch) -> None:
    true_sum = composite.reduce_scatter

    def first_part(x: ttnn.Tensor, dim: int, **options: Any) -> ttnn.Tensor:
        only_first = ttnn.Tensor([x.shards[0], torch.zeros_like(x.shards[1])], x.dtype, x.layout, x.mesh)
        return true_sum(only_first, dim, **options) if options["cluster_axis"] == 1 else x

    monkeypatch.setattr(composite, "reduce_scatter", first_part)


MISTAKES: list[Plant] = [
    softmax_scale_without_mscale,
    tables_without_mscale,
    no_interpolation,
    angles_for_halves,
    large_latent_epsilon,
    keys_for_values,
    bias_in_weights,
    choice_without_bias,
    unscaled_experts,
    no_shared_experts,
    pages_in_order,
    logits_of_the_first_token,
]


@pytest.mark.parametrize("plant", MISTAKES)
def test_a_mistake_is_found(
    plant: Plant, model: Path, reference: DeepseekV3ForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    driver = Driver.load(stage_options(model, tmp_path))
    assert worst_error(driver, reference, TINY["vocab_size"]) > 10 * TOLERANCE
    driver.close()


@pytest.mark.parametrize("plant", [caches_of_the_neighbour, heads_of_the_neighbour, sums_of_one_column])
def test_a_mistake_on_a_mesh_is_found(
    plant: Plant, model: Path, reference: DeepseekV3ForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    driver = Driver.load(stage_options(model, tmp_path, cache=cache_options(pools=2)), mesh_shape=(1, 2))
    assert worst_error(driver, reference, TINY["vocab_size"]) > 10 * TOLERANCE
    driver.close()


def test_without_mistakes(model: Path, reference: DeepseekV3ForCausalLM, tmp_path: Path) -> None:
    driver = Driver.load(stage_options(model, tmp_path))
    assert worst_error(driver, reference, TINY["vocab_size"]) < TOLERANCE
    driver.close()
