"""The family of DeepSeek-V3, R1 and Kimi K2."""

from typing import TYPE_CHECKING

from stages.models.architecture import Architecture
from stages.models.deepseek_v3.costs import OPS, layer_cost
from stages.models.deepseek_v3.weight_specs import (
    embedding_weights,
    head_weights,
    kv_cache_shape,
    layer_weights,
    routed_expert_weights,
    selection,
)

if TYPE_CHECKING:
    from stages.models.module import Modules


def _load_modules() -> "Modules":
    # Here and not above: plans need the rest of the family without torch.
    from stages.models.deepseek_v3.modules import MODULES  # noqa: PLC0415

    return MODULES


DEEPSEEK_V3 = Architecture(
    name="DeepseekV3ForCausalLM",
    embedding_weights=embedding_weights,
    layer_weights=layer_weights,
    routed_expert_weights=routed_expert_weights,
    head_weights=head_weights,
    selection=selection,
    kv_cache_shape=kv_cache_shape,
    rope_width=lambda config: config.qk_rope_head_dim,
    layer_cost=layer_cost,
    ops=OPS,
    load_modules=_load_modules,
)
